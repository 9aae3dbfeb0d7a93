"""What an entry of the catalogue says."""

from __future__ import annotations

from dataclasses import dataclass

from aoconvert.schemes.tensor_classes.entry import TensorClass

WHOLE_INPUT, TOKEN = "a whole input", "a token"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class SchemeEntry:
    """A scheme as the catalogue lists it.

    Attributes:
        name: the canonical name.
        aliases: other names; names are compared without regard to case and to ``-`` or ``_``.
        config: dotted name of the torchao config class.
        fields: what the name fixes, as ``(field, value)`` in the syntax of ``--set``; settings cannot change these.
        defaults: the same for what a setting may change.
        group_field: the config field that takes a group size, ``None`` where torchao has no choice of groups.
        tensor_class: torchao's class of a quantized weight.
        weight_dtype: what a weight becomes.
        activation: what activations become at run time, ``None`` for weight-only. This and the next two are said here
            for the default settings; tests hold them against what torchao makes.
        granularity: what shares one scale.
        bytes_per_parameter: how many bytes a parameter takes in a file, scales included, of 4096 x 4096.
        ranks: how many dimensions a weight may have (3 for the stacked experts of a mixture of experts).
        dtypes: dtypes that a weight may have before.
        multiples: out_features and in_features must be multiples of these.
        fails_on_single_row: dies at run time (``torch._int_mm``) in layers that see a single row of input.
        embeddings: torchao can look rows up in it, so that it also serves the weight of an ``nn.Embedding``.
        tile: rows that share scales or are packed together; a weight can be cut between such tiles.
        layout_device: what ``--layout-device`` calls this layout; ``None``: the scheme has one layout for every device.
        packing: torchao's packing format.
        device: ``any``, or the one device type that can run it.
        min_capability: lowest CUDA compute capability that can run it.
        requires: what has to be installed to quantize, as PEP 508 requirements.
        min_torchao: oldest torchao that loads it, with default settings, and runs it.
        summary: one line, when to choose it.
        source: where that comes from.
        unconfirmed: why nobody can be sure of the packed bytes yet; ``None`` where somebody can.
        hqq_bytes: temporaries of HQQ for each value of a weight, which it takes whole. Measured.
        device_block_bytes: bytes of tensors on a GPU for each value of a block of rows at work, with the error figures;
            torchao takes more steps for values of 4 and 6 bits. Counted on a pretended GPU (tests/pretended_gpu.py).
    """

    name: str
    aliases: tuple[str, ...]
    config: str
    fields: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, str], ...] = ()
    group_field: str | None = None
    tensor_class: TensorClass
    weight_dtype: str
    activation: str | None = None
    granularity: str = "per row"
    bytes_per_parameter: float = 1.0
    ranks: tuple[int, ...] = (2,)
    dtypes: tuple[str, ...] = DTYPES
    multiples: tuple[int, int] = (1, 1)
    fails_on_single_row: bool = False
    embeddings: bool = False
    tile: int = 1
    layout_device: str | None = None
    packing: str = "plain"
    device: str = "any"
    min_capability: tuple[int, int] | None = None
    requires: tuple[str, ...] = ("torchao>=0.18",)
    min_torchao: str = "0.18"
    summary: str
    source: str
    unconfirmed: str | None = None
    hqq_bytes: int = 16
    device_block_bytes: int = 26

    @property
    def config_class(self) -> str:
        """The name of the torchao config class, without its module."""
        return self.config.rpartition(".")[2]

    @property
    def value_bits(self) -> int:
        """How many bits a value has, of which a stored one may have more."""
        return int(self.weight_dtype.removeprefix("int").removeprefix("float").partition("_")[0])

    @property
    def padded(self) -> bool:
        """Whether a stored value has more bits than it means."""
        return self.value_bits < int(8 * self.bytes_per_parameter)

    @property
    def zero_input(self) -> str | None:
        """What of a layer's input becomes NaN where it is all zero, as torchao gives it no scale; ``None``: nothing."""
        if self.activation is None or not self.tensor_class.zero_inputs_fail:
            return None
        return WHOLE_INPUT if "per tensor" in self.activation else TOKEN


@dataclass(frozen=True)
class Family:
    """Names that stand for several schemes; one setting says which.

    Attributes:
        names: the names.
        field: the setting that chooses.
        members: the setting's value -> the scheme's canonical name.
        default: the scheme when the setting is not given; ``None``: it must be given.
    """

    names: tuple[str, ...]
    field: str
    members: tuple[tuple[str, str], ...]
    default: str | None


@dataclass(frozen=True)
class Preset:
    """A name that stands for a scheme and a group size; ``--group-size`` changes the latter.

    Attributes:
        name: the name.
        scheme: the scheme's canonical name.
        group_size: its group size.
    """

    name: str
    scheme: str
    group_size: int


@dataclass(frozen=True)
class Missing:
    """A well-known name that is no scheme here.

    Attributes:
        pattern: regular expression for the whole normalized name.
        reason: why, in a few words.
        nearest: what to take instead, and what differs.
    """

    pattern: str
    reason: str
    nearest: str
