"""Parts of the network as LiteRT programs without weights: the graph of network.py, converted.

A part is traced with its weights as arguments, and converted. In the result, the arguments become
constants whose numbers lie elsewhere in the file: a `Skeleton`, in which a Program later writes
where they are.

One interface used here is private: the converter's experimental_lower_to_saved_model. It was tried
with TensorFlow 2.18 and 2.21.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gpt2cli import console
from gpt2cli.inference.engines.skeletons import Part, Place, Skeleton, packed_shape, weights_of
from gpt2cli.model.network import GPT2, Past
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import weight_shapes
from gpt2cli.tensorflow import tf

WEIGHT = "weight"  # start of the names of the arguments that become constants
ANY_VOCABULARY = 1_234_577  # stands for n_vocab, which is written into a skeleton later


def layers(
    gpt2: GPT2,
    x: tf.Tensor,
    beside: tf.Tensor,
    seen: tf.Tensor,
    keys: list[tf.Tensor],
    values: list[tf.Tensor],
) -> tuple[tf.Tensor, ...]:
    """Run everything between the embedding and `head`.

    Args:
        gpt2: the network.
        x: [1, N, E], sums of token and position embeddings.
        beside: as in Past.
        seen: as in Past.
        keys: of each layer, as in Past.
        values: of each layer, as in Past.

    Returns:
        x [1, N, E], and the new keys and values of each layer, [1, H, N, D].
    """
    past = [Past(beside, seen, *pair) for pair in zip(keys, values, strict=True)]
    x, new = gpt2.layers(gpt2.normed(x), past)
    return x, *(half for pair in new for half in pair)


def head(gpt2: GPT2, x: tf.Tensor) -> tf.Tensor:
    """Return the product of x [N, E] with wte: logits [N, V]."""
    return gpt2.head(x)


PARTS: dict[Part, Callable[..., Any]] = {"layers": layers, "head": head}


def convert(part: Part, config: ModelConfig) -> Skeleton:
    """Convert a part of the network; n_vocab and n_ctx have no influence. Takes seconds."""
    config = dataclasses.replace(config, n_vocab=ANY_VOCABULARY)
    with console.without_noise():
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [_trace(part, config)], tf.Module()
        )
        converter.experimental_lower_to_saved_model = False  # three times slower, same result
        made = converter.convert()
    shapes = weight_shapes(config)
    return _with_places(made, [packed_shape(n, shapes[n]) for n in weights_of(part, config)])


def _inputs(part: Part, config: ModelConfig) -> list[Any]:
    """Return the TensorSpecs of a part's inputs.

    Two sizes that are None here must not meet in one reshape: LiteRT gives the whole graph to
    XNNPACK only if no shape is computed at run time.
    """
    if part == "head":
        return [tf.TensorSpec([None, config.n_embd], name="x")]
    slots = [None, config.n_head, None, config.n_embd // config.n_head]
    return [
        tf.TensorSpec([1, None, config.n_embd], name="x"),
        tf.TensorSpec([None, None], name="beside"),
        tf.TensorSpec([None, 1, 1, None], name="seen"),
        *(
            [tf.TensorSpec(slots, name=f"{half}{layer}") for layer in range(config.n_layer)]
            for half in ("keys", "values")
        ),
    ]


def _trace(part: Part, config: ModelConfig) -> Any:
    """Return the concrete function of a part, with its weights as the last arguments."""
    names, shapes = weights_of(part, config), weight_shapes(config)
    packed = {name: packed_shape(name, shapes[name]) for name in names}

    def traced(*inputs: Any) -> Any:
        *given, weights = inputs
        weight_of = dict(zip(names, weights, strict=True))

        def weight(name: str, shape: tuple[int, ...]) -> tf.Tensor:
            if name not in weight_of:
                return tf.zeros([])  # a weight of another part
            weight_of[name].set_shape(packed[name])
            is_transposed = packed[name] != shape
            return tf.transpose(weight_of[name]) if is_transposed else weight_of[name]

        return PARTS[part](GPT2(config, weight, hold=lambda value, name: value), *given)

    # With sizes, the converter would make arrays of zeros as large as the whole model.
    arguments = [
        tf.TensorSpec([None] * len(packed[name]), name=f"{WEIGHT}{number}")
        for number, name in enumerate(names)
    ]
    signature = [*_inputs(part, config), arguments]
    return tf.function(traced, input_signature=signature, autograph=False).get_concrete_function()


def _with_places(made: bytes, shapes: Sequence[tuple[int, ...]]) -> Skeleton:
    """Return a converted program with its arguments as constants, and where to describe these.

    A matrix gets the type INT8, and a scale and a zero point of one number each.

    Args:
        made: the converted program.
        shapes: of the weights, in the order of the arguments.
    """
    program = schema.ModelT.InitFromPackedBuf(made)
    graph = program.subgraphs[0]
    index_of = {graph.tensors[index].name.decode(): index for index in graph.inputs}
    constants = [index_of[f"{WEIGHT}{number}"] for number in range(len(shapes))]
    graph.inputs = np.array([i for i in graph.inputs if i not in constants], np.int32)
    for index, shape in zip(constants, shapes, strict=True):
        tensor, buffer = graph.tensors[index], schema.BufferT()
        tensor.shape, tensor.shapeSignature = np.array(shape, np.int32), None
        buffer.offset = buffer.size = 1  # a field that is 0 would be left out
        tensor.buffer = len(program.buffers)
        program.buffers.append(buffer)
        if len(shape) > 1:
            tensor.type = schema.TensorType.INT8
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.zeros(1, np.float32)
            tensor.quantization.zeroPoint = np.zeros(1, np.int64)
    builder = flatbuffers.Builder(len(made))
    builder.Finish(program.Pack(builder), b"TFL3")
    content = bytes(builder.Output())
    inputs = [graph.tensors[index].name.decode() for index in graph.inputs]
    return Skeleton(content, inputs, *_places(content, constants))


def _places(content: bytes, constants: Sequence[int]) -> tuple[list[Place], list[int]]:
    """Return where the constants are described, and where the number of tokens is."""

    def field(table: Any, slot: int) -> int:
        found = table._tab.Offset(4 + 2 * slot)
        assert found, f"{type(table).__name__} has no field {slot}"
        return int(table._tab.Pos + found)

    program = schema.Model.GetRootAs(content)
    graph = program.Subgraphs(0)
    places = []
    for index in constants:
        tensor = graph.Tensors(index)
        buffer, scale = program.Buffers(tensor.Buffer()), tensor.Quantization()
        is_matrix = tensor.ShapeLength() > 1
        of_matrix = [field(tensor, 1), field(scale, 2), field(scale, 3)] if is_matrix else [0] * 3
        places.append(Place(field(buffer, 1), field(buffer, 2), *of_matrix))
    vocabulary = []
    for index in range(graph.TensorsLength()):
        tensor = graph.Tensors(index)
        for slot in (0, 7):  # shape and shape_signature
            if found := tensor._tab.Offset(4 + 2 * slot):
                start, length = tensor._tab.Vector(found), tensor._tab.VectorLen(found)
                sizes = np.frombuffer(content, "<i4", length, start)
                vocabulary += [int(start + 4 * n) for n in np.flatnonzero(sizes == ANY_VOCABULARY)]
    return places, vocabulary
