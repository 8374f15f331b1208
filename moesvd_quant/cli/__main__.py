"""python -m moesvd_quant.cli"""

from . import main

main()
