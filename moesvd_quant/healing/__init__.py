"""Healing: what a compressed checkpoint lost is trained back (stage `lora`)."""
