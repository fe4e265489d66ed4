"""ONNX models and what runs them on a CPU: ONNX Runtime and OpenVINO, as bodies of a chain."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from io import BytesIO
from math import prod
from typing import Any

import torch
from torch import nn

from diffpolicy.control.compiled.chain import Body
from diffpolicy.control.compiled.timing import median_ms


def to_onnx(module: nn.Module, arguments: tuple[Any, ...], inputs: list[str], outputs: list[str]) -> Any:
    """Return a module as an `onnx.ModelProto`, for arguments of these shapes, with these names."""
    with quiet(), torch.no_grad():
        program = torch.export.export(module, arguments)
        exported = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    assert exported is not None
    return exported.model_proto


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what exporters say of packages nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def onnxruntime_body(model: Any) -> Body:
    """Return the body that an `onnx.ModelProto` is."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def body(x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        feed = {"x_t": x_t.numpy(), "modulation": modulation.numpy()}
        return torch.from_numpy(session.run(None, feed)[0])

    return body


def eight_bits(model: Any, large: float) -> Any:
    """Return a copy whose products with `large` weights or more are `MatMulNBits`: 8 bits, one scale to 128 weights."""
    quantizer = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    sizes = {weight.name: prod(weight.dims) for weight in model.graph.initializer}
    small = [node.name for node in model.graph.node if all(sizes.get(name, 0) < large for name in node.input)]
    with quiet():
        of = quantizer.MatMulNBitsQuantizer(
            deepcopy(model), bits=8, block_size=128, is_symmetric=True, accuracy_level=4, nodes_to_exclude=small
        )
        of.process()
    return of.model.model


def openvino_body(model: Any, precision: str) -> Body:
    """Return the faster of one thread and of PyTorch's many: threads that share a core cost small networks more."""
    bodies = [_openvino_threads(model, precision, threads) for threads in sorted({1, torch.get_num_threads()})]
    return bodies[0][0] if len(bodies) == 1 else min(bodies, key=lambda each: median_ms(lambda: each[0](*each[1])))[0]


def _openvino_threads(model: Any, precision: str, threads: int) -> tuple[Body, tuple[torch.Tensor, ...]]:
    """Return the body, and arguments to time it with."""
    core = import_module("openvino").Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "SNIPPETS_MODE": "DISABLE",  # 2026.4 takes Mish between two products for a pattern it knows, and crashes
    }
    compiled = core.compile_model(core.read_model(BytesIO(model.SerializeToString())), "CPU", options)
    request = compiled.create_infer_request()

    def body(x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(request.infer([x_t.numpy(), modulation.numpy()], share_inputs=True)[0])

    return body, tuple(torch.zeros(tuple(port.shape)) for port in compiled.inputs)


def lacks_bfloat16(kind: str) -> str:
    """Return why OpenVINO's device of this kind, `cpu`, does not compute in bfloat16, nothing if it does."""
    core = import_module("openvino").Core()
    if "BF16" in core.get_property(kind.upper(), "OPTIMIZATION_CAPABILITIES"):
        return ""
    return "needs a CPU that multiplies bfloat16 (AVX512-BF16 or AMX); choose openvino-int8 or openvino"
