"""Quantisers of weights after their papers, and the pipeline that runs one over a model."""

from techniques.quantization.quantizers.autoround import AutoRound, AutoRoundOptions
from techniques.quantization.quantizers.awq import AWQ, AWQOptions
from techniques.quantization.quantizers.base import InputStatistics, Needs, Quantizer
from techniques.quantization.quantizers.calibration import PlainLinear
from techniques.quantization.quantizers.fp8 import FP8
from techniques.quantization.quantizers.gptq import GPTQ, GPTQOptions
from techniques.quantization.quantizers.hqq import HQQ, HQQOptions
from techniques.quantization.quantizers.partial import PartialModel
from techniques.quantization.quantizers.pipeline import PipelineOptions, quantize_decoder
from techniques.quantization.quantizers.report import LayerReport, QuantizedModel
from techniques.quantization.quantizers.rtn import RTN, RTNOptions
from techniques.quantization.quantizers.smoothquant import SmoothQuant, SmoothQuantOptions

__all__ = [
    "AWQ",
    "FP8",
    "GPTQ",
    "HQQ",
    "RTN",
    "AWQOptions",
    "AutoRound",
    "AutoRoundOptions",
    "GPTQOptions",
    "HQQOptions",
    "InputStatistics",
    "LayerReport",
    "Needs",
    "PartialModel",
    "PipelineOptions",
    "PlainLinear",
    "QuantizedModel",
    "Quantizer",
    "RTNOptions",
    "SmoothQuant",
    "SmoothQuantOptions",
    "quantize_decoder",
]
