"""AutoRound's tuned rounding and its own packed linears. SETTING: the number of bits."""

from pathlib import Path

import torch
from auto_round import AutoRound
from exchange import calibration, main, safetensors_sizes, texts, write_sizes
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

GROUP = 64  # divides rows of 192 as well
BATCH = 8


def make(model: Path, windows: Path, setting: str, out: Path) -> None:
    rows = torch.from_numpy(calibration(windows))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rounding = AutoRound(
        loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        scheme={"bits": int(setting), "group_size": GROUP, "sym": False, "data_type": "int", "act_bits": 16},
        dataset=list(rows.split(BATCH)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
    )
    rounding.quantize_and_save(str(out), format="auto_round")
    (saved,) = (file.parent for file in out.rglob("config.json"))
    for file in saved.iterdir() if saved != out else ():  # it saves into a folder of its own choice
        file.rename(out / file.name)
    write_sizes(safetensors_sizes(out), out)


@torch.no_grad()
def logits(windows: Path, out: Path):
    plain = AutoRoundConfig(backend="auto_round:torch")  # else 4 bits fail without saying what is missing
    loaded = AutoModelForCausalLM.from_pretrained(out, device_map="cpu", quantization_config=plain).eval()
    for row in torch.from_numpy(texts(windows)):
        yield loaded(input_ids=row[None], use_cache=False).logits[0].float().numpy()


if __name__ == "__main__":
    main(make, logits)
