"""Quantisation."""

from isolith.ops.quant.act_quant_fp4 import act_quant_fp4 as act_quant_fp4
from isolith.ops.quant.act_quant_fp8 import act_quant_fp8 as act_quant_fp8
from isolith.ops.quant.act_quant_int8 import act_quant_int8 as act_quant_int8
from isolith.ops.quant.block_dequant import block_dequant as block_dequant
from isolith.ops.quant.quant_linear import quant_linear as quant_linear
