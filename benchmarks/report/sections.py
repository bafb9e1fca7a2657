"""What each benchmark shows on the page: its question, its table, its plots, and the command that measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..records import Record
from . import figures
from .columns import Column, exponent, hundredths, mebibytes, milliseconds, thousandths
from .results import PREDICTED
from .summaries import audit_totals, kernels_table, zoo_totals

#: In the headings of the page, or of no use to a reader.
NOT_SHOWN = ("benchmark", "machine", "device", "threads", "measure")

OP, MODEL, CASE, SHAPE = (Column(name, name) for name in ("op", "model", "case", "shape"))
PASS, DTYPE, PROVIDER, STATUS = (Column(name, name) for name in ("pass", "dtype", "provider", "status"))
RATIO = Column("ratio", "time ÷ braze's (95 %)", hundredths, ("ratio_low", "ratio_high"))
LIKE_RATIO = Column(
    "like_ratio", "÷ braze's, run the same way (95 %)", hundredths, ("like_ratio_low", "like_ratio_high")
)
MS = Column("median_ms", "ms, median (quartiles)", ends=("quartile_low_ms", "quartile_high_ms"))
SECONDS = Column("median_s", "ms, median (quartiles)", milliseconds, ("quartile_low_s", "quartile_high_s"))
LEAST, PEAK = (
    Column("least_bytes", "least MiB moved", mebibytes),
    Column("peak_bytes", "peak memory, MiB", mebibytes),
)


def _all(records: Sequence[Record]) -> list[Record]:
    return list(records)


def _nothing(records: Sequence[Record]) -> str:
    return ""


@dataclass(frozen=True)
class Section:
    """One benchmark on the page."""

    benchmark: str
    title: str
    #: What its figures say, in a sentence or two.
    meaning: str
    columns: Sequence[Column] = ()
    draw: Callable[[Sequence[Record]], list[figures.Figure]] = figures.none
    #: The rows of its table.
    rows: Callable[[Sequence[Record]], list[Record]] = _all
    #: What its records come to, in a sentence.
    note: Callable[[Sequence[Record]], str] = _nothing

    @property
    def command(self) -> str:
        """What measures it."""
        return f"python -m braze.benchmarks {self.benchmark.split()[0]}"


OPS = (
    OP, SHAPE, PASS, DTYPE, PROVIDER, MS, RATIO,
    Column("error_outputs", "error of outputs", exponent), Column("error_gradients", "error of gradients", exponent),
    Column("host_us", "host µs a call"), PEAK, LEAST,
    Column("percent_of_copy", "% of copy ceiling"), Column("percent_of_matmul", "% of matmul ceiling"),
    Column("cold_median_ms", "cold ms"), Column("cold_ratio", "cold ratio", hundredths),
    Column("predicted_us", "predicted µs"), Column("implementation", "runs"), STATUS,
)  # fmt: skip

SECTIONS = (
    Section("ops", "Operators",
            "Every operator against the plain PyTorch call, torch.compile of it, and other libraries where they are "
            "installed; errors are the largest against float64, relative to the largest entry.",
            OPS, figures.operators),
    Section("models", "Models",
            "A training step, or inference, of whole models.",
            (MODEL, PASS, PROVIDER, MS, RATIO, LIKE_RATIO, PEAK, Column("loss", "final loss")), figures.models),
    Section("scaling", "Scaling",
            "How time and memory grow with one size; dashed is the time that the machine's own ceilings allow.",
            (OP, PASS, DTYPE, Column("axis", "axis"), Column("size", "size"), PROVIDER, MS, PEAK, LEAST),
            figures.scaling),
    Section("losses", "Head and loss",
            "A language model's end, forward and backward: the last linear layer and the cross-entropy; memory is the "
            "peak above operands and gradients.",
            (SHAPE, DTYPE, PROVIDER, SECONDS, RATIO, PEAK, Column("peak_of_eager", "of eager's", thousandths),
             Column("gradients_apart", "gradients from eager's", exponent)), figures.losses),
    Section("optim", "Optimizers", "A step on the parameters of a model against torch.optim's three forms.",
            (MODEL, OP, PROVIDER, SECONDS, RATIO), figures.intervals),
    Section("loaders", "Loaders", "From samples to batches.", (CASE, PROVIDER, SECONDS, RATIO), figures.intervals),
    Section("channels_last", "Memory formats", "A training step in channels_last and contiguous.",
            (MODEL, SHAPE, PROVIDER, SECONDS, Column("ratio", "time ÷ channels_last's (95 %)", hundredths,
                                                     ("ratio_low", "ratio_high"))), figures.intervals),
    Section("freed_memory", "Freed memory",
            "Models fused by braze on the CPU, in a process that keeps the memory which tensors free and in one that "
            "gives it back; page faults are those of one step.",
            (MODEL, PASS, PROVIDER, MS, Column("ratio", "time ÷ kept's (95 %)", hundredths,
                                               ("ratio_low", "ratio_high")),
             Column("page_faults", "page faults"), Column("process_bytes", "most held, MiB", mebibytes)),
            figures.intervals),
    Section("packing", "Packing", "A training step on packed and on padded batches of the same documents.",
            (MODEL, PROVIDER, SECONDS, Column("ratio", "time ÷ padded's (95 %)", hundredths,
                                              ("ratio_low", "ratio_high"))), figures.intervals),
    Section("rounding", "Rounding", "A model trained in bfloat16 alone, by how its parameters are rounded.",
            (MODEL, PROVIDER, Column("train_loss", "train loss"),
             Column("train_of_float32", "of float32's", thousandths), Column("validation_loss", "validation loss"),
             Column("validation_of_float32", "of float32's", thousandths)), figures.rounding),
    Section("kernels", "Triton kernels",
            "Judged with no GPU. The worst over variants, dtypes and sizes: bytes moved ÷ the least possible, and "
            "machine code for each target.",
            (OP, PASS, Column("kernel", "kernel"), Column("ratio", "bytes ÷ least", thousandths),
             Column("reason", "why more than 1.02"), Column("target", "target"), Column("registers", "registers"),
             Column("spills", "bytes spilled"), Column("widest_load", "widest load, bit"),
             Column("widest_store", "widest store, bit")), figures.traffic, kernels_table),
    Section(PREDICTED, "Predicted times",
            "What the kernels should take on GPUs that have not been seen: launches, and bytes over a ceiling that is "
            "assumed. For a model, an optimizer's step of its parameters. Not measured.",
            (OP, MODEL, SHAPE, PASS, DTYPE, Column("predicted_us", "predicted µs"))),
    Section("tune", "Launch parameters",
            "What was reasoned out against what a search on this GPU ended with, and what became of that.",
            (Column("kernel", "kernel"), OP, SHAPE, PASS, DTYPE, Column("fixed", "constants"),
             Column("reasoned", "reasoned"), Column("measured", "measured"), Column("reasoned_ms", "reasoned, ms"),
             Column("measured_ms", "measured, ms"),
             Column("ratio", "time ÷ reasoned (95 %)", thousandths, ("ratio_low", "ratio_high")), STATUS)),
    Section("zoo", "Fusing models", "Joints that fuse found and swapped, against an independent count.",
            (MODEL, Column("found", "counted"), Column("swapped", "swapped"), Column("missed", "missed"),
             Column("right", "right"), Column("unfuse_equal", "unfuse gives every bit back"),
             Column("output_error", "output error, float64", exponent),
             Column("gradient_error", "gradient error, float64", exponent),
             Column("output_difference_float32", "output difference, float32", exponent),
             Column("gradient_difference_float32", "gradient difference, float32", exponent)),
            note=zoo_totals),
    Section("audit", "Layout audit",
            "Which models keep channels_last, and which lose it where, in training, forward and backward.",
            (MODEL, Column("verdict", "verdict"), Column("cpu_verdict", "on the CPU"),
             Column("cuda_verdict", "on CUDA, predicted"), Column("cpu_convolutions", "convolutions"),
             Column("cpu_nchw", "fed NCHW, forward"), Column("cpu_nchw_backward", "backward"),
             Column("worst", "worst place")), note=audit_totals),
)  # fmt: skip


def sections(records: Sequence[Record]) -> list[Section]:
    """Those above, and one for every kind of record that has none."""
    known = {section.benchmark for section in SECTIONS} | {"ops geometric mean"}
    others = dict.fromkeys(str(r["benchmark"]) for r in records if r["benchmark"] not in known)
    return [*SECTIONS, *(Section(name, name.capitalize(), "", draw=figures.intervals) for name in others)]
