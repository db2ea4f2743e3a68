"""Statistics of a model's inputs while it runs: sums per input channel of every weight that AIM may relax."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from aim.activations import ChannelStatistics, Means, stack_statistics
from aim.sums import KEPT, PEAK, PEAK_AT, UNKNOWN, Sums
from checkpoints.errors import InputError
from checkpoints.settings import setting
from forward.loading import CannotRun
from forward.parts import Use
from forward.watch import Watch
from streaming.twins import use_compiled

KEYS = ("numbers", "first_rows", "other_rows")
"""What is kept of `Sums`."""
OTHERS = "means."
"""How sums of other kinds begin, which `aim.reference` has."""
ALONE = 0.02
"""Share by which sums over first tokens may differ when these run by themselves: by what a coarse dtype rounds."""
NO_TOKEN = "its module saw no token"
NO_PRODUCT = "no product of the forward pass has it"


@dataclass(frozen=True)
class Target:
    """A checkpoint tensor whose input is watched.

    Attributes:
        parameter: which becomes it in the model.
        axes: for each dimension of the parameter the one of the stored tensor; None where it has none.
        expert: which index of the parameter's first dimension the stored tensor is, where several become one.
        shape: of the stored tensor.
        is_known: whether its module says that it is multiplied; else only the forward pass shows it.
    """

    parameter: str
    axes: tuple[int | None, ...]
    shape: tuple[int, ...]
    expert: int | None = None
    is_known: bool = True

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm's weight, which takes part in no product."""
        return len(self.shape) == 1


@dataclass(frozen=True)
class _Last:
    """The last input that was summed up. Holding it keeps its memory from being reused, so that identity means the same numbers."""

    x: torch.Tensor
    version: int
    sums: Sums

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether an input is that one, or a view of the same numbers in the same order."""
        ours = self.x
        if self.version != x._version:
            return False
        return ours is x or (
            ours.data_ptr() == x.data_ptr()
            and ours.untyped_storage()._cdata == x.untyped_storage()._cdata
            and (ours.numel(), ours.shape[-1], ours.dtype) == (x.numel(), x.shape[-1], x.dtype)
            and ours.is_contiguous()
            and x.is_contiguous()
        )


class Watcher:
    """Collects statistics while the model runs under `watching`.

    Args:
        model: any module tree; its forward is not changed.
        targets: checkpoint tensor -> where its input shows up.
        head: the weight of an output head whose product nobody needs.
        compiled: use compiled loops on a CPU, as soon as `streaming.twins.compiling` has them; the numbers are the same.

    Attributes:
        block: `(blocks, tokens)` of the batch that runs, which says which rows are first tokens; None where nothing does.
        watch: sees the inputs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        targets: Mapping[str, Target],
        *,
        head: torch.Tensor | None = None,
        compiled: bool = False,
    ):
        self._targets = targets
        self._compiled = compiled
        first: dict[int, str] = {}  # a parameter that several modules share goes by the first one's name
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._names = {name: first.setdefault(id(one), name) for name, one in parameters.items()}
        self._shapes = {name: tuple(one.shape) for name, one in parameters.items()}
        wanted = {self._names[one.parameter]: one.is_vector for one in targets.values()}
        vectors, products = (
            [name for name, kind in wanted.items() if kind is is_vector] for is_vector in (True, False)
        )
        self.watch = Watch(model, self.observe, products=products, vectors=vectors, head=head)
        self.block: tuple[int, int] | None = None
        self._sums: dict[Use, Sums] = {}
        self._blind: set[Use] = set()
        self._last: _Last | None = None
        self._only_first = False
        self._alone: dict[Use, Sums] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have the model watched for the length of the context."""
        try:
            with self.watch:
                yield
        finally:
            self._last = None

    @contextmanager
    def first_tokens(self) -> Iterator[None]:
        """Count what runs as the first tokens of all blocks that have run, for those inputs whose rows did not tell.

        That says something only of a model that reads from left to right, whose first token is by itself what it is in its block:
        where the inputs that did tell show that it is not, or it cannot be run on one token, nothing is known of the others.
        """
        self._settle()
        self._alone.clear()
        self._only_first = True
        can_run = True
        try:
            yield
        except CannotRun:
            can_run = False
        finally:
            self._only_first = False
        if can_run and self._is_same_alone():
            self._blind -= {use for use in set(self._blind) if self._take_first(use)}

    def _is_same_alone(self) -> bool:
        """Whether the inputs that told their first tokens had the same when these ran by themselves."""
        told = [use for use in self._alone if use not in self._blind]
        pairs = [(self._sums[use].totals[0, 0], self._alone[use].totals[:, 0].sum(dim=0)) for use in told]
        return bool(pairs) and all(bool((one.to(other.device) - other).norm() <= ALONE * other.norm()) for one, other in pairs)  # fmt: skip

    def _take_first(self, use: Use) -> bool:
        """Tell an input's first tokens from the others; False, and nothing changed, where they are more than there are tokens."""
        sums, alone = self._sums[use], self._alone.get(use)
        whole, rows = sums.totals.sum(dim=0), sums.first_rows + sums.other_rows
        first = torch.zeros_like(whole) if alone is None else alone.totals.sum(dim=0).to(whole.device)
        first_rows = 0 if alone is None else alone.first_rows + alone.other_rows
        rest = whole - first
        if first_rows > rows or bool((rest[:2] < -ALONE * whole[:2]).any()):
            return False
        rest[:2].clamp_(min=0.0)
        sums = self._sums[use] = sums.part_with(use)
        sums.totals[0], sums.totals[1] = first, rest
        sums.first_rows, sums.other_rows = first_rows, rows - first_rows
        return True

    @property
    def leaves_head_out(self) -> bool:
        """Whether the output head's product is not computed."""
        return self.watch.head is not None

    @property
    def knows_first_tokens(self) -> bool:
        """Whether every input told which of its rows were first tokens; else those run again under `first_tokens`."""
        return not self._blind

    def observe(self, use: Use, x: torch.Tensor) -> None:
        """Add an input `[..., channels]`; one that several weights share is summed once. See `forward.watch.See`."""
        x = x.detach() if x.requires_grad else x
        sums = self._sums.get(use)
        if sums is not None and sums.width != x.shape[-1]:
            return
        if self._only_first:
            if sums is not None:
                self._add_alone(use, x)
            return
        last = self._last if self._last is not None and self._last.is_of(x) else None
        if last is not None:
            if sums is None and last.sums.inputs == 1:
                sums = self._sums[use] = last.sums
                self._blind |= {use} if sums.seen.keys() & self._blind else set()
                sums.seen[use] = 0
            if sums is last.sums and sums.seen[use] < sums.inputs:  # it was added for another weight
                sums.seen[use] = sums.inputs
                return
        if sums is None:
            sums = self._sums[use] = Sums(x.shape[-1], x.device)
            sums.seen[use] = 0
        self._part(sums)
        sums = self._sums[use]
        self._add(sums, x, use)
        sums.seen[use] = sums.inputs
        if last is None:
            self._last = _Last(x, x._version, sums)

    def _add(self, sums: Sums, x: torch.Tensor, use: Use) -> None:
        """Add an input to sums. The thread is any that the model runs in."""
        per_token = self._rows_per_token(x)
        blocks = self.block[0] if self.block is not None and per_token else 1
        if not per_token:
            self._blind.update(sums.seen)
        use_compiled(self._compiled and x.device.type == "cpu")
        try:
            sums.add(x.reshape(blocks, -1, x.shape[-1]), per_token or 0)
        finally:
            use_compiled(False)

    def _add_alone(self, use: Use, x: torch.Tensor) -> None:
        """Add an input of first tokens that run by themselves."""
        alone = self._alone.setdefault(use, Sums(x.shape[-1], x.device))
        alone.add(x.reshape(1, -1, x.shape[-1]), x.numel() // x.shape[-1])

    def _rows_per_token(self, x: torch.Tensor) -> int | None:
        """Rows of an input for each token, in the order of the tokens; None where that is not so."""
        if self.block is None:
            return None
        blocks, length = self.block
        if x.ndim > 2 and x.shape[:2] == (blocks, length):
            return x.numel() // x.shape[-1] // (blocks * length)
        return 1 if x.ndim == 2 and len(x) == blocks * length else None

    def sums(self) -> dict[str, torch.Tensor]:
        """All that has been added up, under names that `restore` knows."""
        self._settle()
        found: dict[str, torch.Tensor] = {}
        for place, (use, sums) in enumerate(self._sums.items()):
            name = json.dumps([place, use.as_json(), use in self._blind])
            found |= {f"{name}.{key}": torch.as_tensor(getattr(sums, key)) for key in KEYS}
        return found

    @staticmethod
    def check_sums(tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError where this is not what `sums` gave, but another version or somebody else wrote it."""
        for name in {name.rpartition(".")[0] for name in tensors if not name.startswith(OTHERS)}:
            key = json.loads(name)
            if not isinstance(key, list) or len(key) != 3:
                raise ValueError(f"{name}: no sums of an input")
            Use.of_json(key[1])
            shapes = [tuple(tensors[f"{name}.{part}"].shape) for part in KEYS if f"{name}.{part}" in tensors]
            if [len(one) for one in shapes] != [2, 0, 0] or shapes[0][0] != KEPT:
                raise ValueError(f"{name}: sums that do not fit each other")

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what another watcher's `sums` gave."""
        for name in sorted({name.rpartition(".")[0] for name in tensors}, key=json.loads):
            _, content, blind = json.loads(name)
            use = Use.of_json(content)
            numbers, *rows = (tensors[f"{name}.{key}"] for key in KEYS)
            self._share(use, Sums.of(numbers.clone(), *map(int, rows)))
            self._blind |= {use} if blind else set()

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add what the `sums` of another watcher gave, whose inputs came after one's own."""
        other = type(self).__new__(type(self))
        other._sums, other._blind = {}, set()
        other.restore(tensors)
        self._settle()
        own, self._sums = self._sums, {}
        for use in {**own, **other._sums}:
            mine, theirs = own.get(use), other._sums.get(use)
            both = mine.plus(theirs) if mine and theirs else mine or theirs
            assert both is not None
            self._share(use, Sums.of(both.numbers, both.first_rows, both.other_rows))
        self._blind |= other._blind

    def forget(self) -> None:
        """Forget all sums."""
        self._sums.clear()
        self._last = None

    def _share(self, use: Use, sums: Sums) -> None:
        """Give a use restored sums, or those that are equal to them: most are of weights that have the same inputs."""
        before = next(reversed(self._sums.values()), None)
        if before is not None and before.is_equal(sums):
            sums = before
        sums.seen[use] = sums.inputs
        self._sums[use] = sums

    def _settle(self) -> None:
        """Give those uses sums of their own that have not seen what others with them saw last."""
        for sums in {id(one): one for one in self._sums.values()}.values():
            self._part(sums)
        self._last = None

    def _part(self, sums: Sums) -> None:
        for use in sums.lagging():
            self._sums[use] = sums.part_with(use)

    def check_finite(self) -> None:
        """Raise InputError where an input held NaN or an infinity, naming the first such weight of the forward pass."""
        self._settle()
        for use, sums in self._sums.items():  # in the order in which they were first seen
            if not bool(sums.totals[:, 1].isfinite().all()):
                where = use.parameter.removesuffix(".weight")
                raise InputError(
                    f"{where}: its input holds NaN or an infinity, the first to do so. Use {setting('calibration.dtype', 'float32')}, or check the base model."
                )

    def totals(self) -> dict[Use, torch.Tensor]:
        """Sums of |x| of every input so far, `[in]` float64 on the CPU."""
        self._settle()
        return {use: sums.totals[:, 0].sum(dim=0).cpu() for use, sums in self._sums.items()}

    def results(self) -> tuple[dict[str, ChannelStatistics], dict[str, int], dict[str, str]]:
        """Statistics and the input dimension of each checkpoint tensor, and for each tensor without any the reason.

        Raises: InputError: an input that holds NaN or an infinity, naming the weight.
        """
        self.check_finite()
        statistics: dict[str, ChannelStatistics] = {}
        dims: dict[str, int] = {}
        silent: dict[str, str] = {}
        by_parameter: dict[str, list[Use]] = {}
        for use in self._sums:
            by_parameter.setdefault(use.parameter, []).append(use)
        for tensor, target in self._targets.items():
            found = self._result(target, by_parameter.get(self._names[target.parameter], []))
            if isinstance(found, str):
                silent[tensor] = found
            else:
                statistics[tensor], dims[tensor] = found
        return statistics, dims, silent

    def _result(self, target: Target, uses: Sequence[Use]) -> tuple[ChannelStatistics, int] | str:
        """Statistics and input dimension of one checkpoint tensor, or why it has none."""
        if not uses:
            return NO_TOKEN if target.is_known else NO_PRODUCT
        ways = {use.axes for use in uses}
        if len(ways) > 1:
            return f"it is multiplied along {len(ways)} of its dimensions"
        axes = ways.pop()
        dim = target.axes[axes[0]]
        if dim is None or [target.axes[axis] for axis in axes] != list(range(dim, dim + len(axes))):
            return "its input channels are joined from several tensors"
        shape = self._shapes[target.parameter]
        seen = next(self._sums[use].width for use in uses)
        if target.is_vector and seen != shape[0]:
            return f"its module's input has {seen} channels, the weight {shape[0]}"
        cells = _Cells(uses, shape, axes, self._sums, knows_first=not self._blind & set(uses))
        stacked_axis, table = cells.stack()
        if len(table) == 1:
            one = table[0]
        elif stacked_axis is None:
            one = cells.pooled()
        elif stacked_axis == 0 and target.expert is not None:
            one = table[target.expert]
        elif target.axes[stacked_axis] == 0 and len(target.shape) == len(shape) > 2:
            one = stack_statistics(table)
        elif stacked_axis == 0 and len(shape) == 2 and dim == 1 and (groups := _equal_groups(table)):
            one = stack_statistics(groups)  # the rows of one expert below those of another
        else:
            one = cells.pooled()  # its rows have different inputs
        if not bool((one.tokens > 0).any()):
            return NO_TOKEN
        if not bool(one.mean_abs.any()):
            return "its module's input is zero throughout"
        return one, dim


def _equal_groups(table: Sequence[ChannelStatistics]) -> list[ChannelStatistics]:
    """One for each group of as many rows, none of which has two inputs; nothing where that would be each row. Experts that saw no token are
    one run with their neighbours that saw none."""
    size = math.gcd(*(len(list(run)) for _, run in itertools.groupby(table, key=id)))
    return list(table[::size]) if size > 1 else []


class _Cells:
    """The uses of a parameter, put together: which of its parts have which input.

    Args:
        uses: all along `axes`.
        shape: of the parameter.
        sums: of each.
        knows_first: whether
            they tell first tokens from others.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        shape: tuple[int, ...],
        axes: Sequence[int],
        sums: Mapping[Use, Sums],
        *,
        knows_first: bool,
    ):
        self._uses, self._shape, self._axes, self._sums, self._knows_first = uses, shape, axes, sums, knows_first

    def pooled(self) -> ChannelStatistics:
        """One for all parts: means over the inputs of all of them, each as often as it has rows of the weight."""
        times = {
            use: math.prod(high - low for axis, (low, high) in enumerate(use.ranges) if axis not in self._axes)
            for use in self._uses
        }
        return self._together(self._uses, times)

    def stack(self) -> tuple[int | None, list[ChannelStatistics]]:
        """Statistics, one for each index of the dimension that is returned with them, or one where all parts have one input.

        Where parts have different inputs along more than one dimension, it is one for all of them, see `pooled`.
        """
        cuts = {
            axis: sorted({0, size, *(edge for use in self._uses for edge in use.ranges[axis])})
            for axis, size in enumerate(self._shape)
            if axis not in self._axes and any(use.ranges[axis] != (0, size) for use in self._uses)
        }
        cells: dict[tuple[int, ...], tuple[Use, ...]] = {}
        for corner in itertools.product(*(edges[:-1] for edges in cuts.values())):
            place = dict(zip(cuts, corner, strict=True))
            cells[corner] = tuple(
                use
                for use in self._uses
                if all(use.ranges[axis][0] <= at < use.ranges[axis][1] for axis, at in place.items())
            )
        statistics = {uses: self._together(uses) for uses in set(cells.values())}
        axes = list(cuts)
        for axis in list(cuts):  # leave out a dimension along which nothing differs
            position = axes.index(axis)
            by_rest: dict[tuple[int, ...], list[ChannelStatistics]] = {}
            for corner, uses in cells.items():
                by_rest.setdefault(corner[:position] + corner[position + 1 :], []).append(statistics[uses])
            if all(_are_same(ones) for ones in by_rest.values()):
                cells = {corner[:position] + corner[position + 1 :]: uses for corner, uses in cells.items()}
                axes.remove(axis)
        if not axes:
            return None, [statistics[uses] for uses in cells.values()][:1]
        if len(axes) > 1:
            return None, [self.pooled()]
        edges = cuts[axes[0]]
        table = []
        for low, high in itertools.pairwise(edges):
            table += [statistics[cells[(low,)]]] * (high - low)
        return axes[0], table

    def _together(self, uses: Sequence[Use], times: Mapping[Use, int] | None = None) -> ChannelStatistics:
        """Statistics of a part that has these uses, one after the other or for parts of its channels.

        Args:
            times: how often each counts, in proportion; once where it is not said.
        """
        times = times or dict.fromkeys(uses, 1)
        common = math.gcd(*times.values())
        width = math.prod(self._shape[axis] for axis in self._axes)
        totals = torch.zeros(2, 3, width, dtype=torch.float64)
        rows = torch.zeros(2, width, dtype=torch.int64)
        peak, peak_at = torch.zeros(width), torch.full((width,), UNKNOWN, dtype=torch.int64)
        for use in uses:
            here, sums = slice(*use.channels), self._sums[use]
            weight = times[use] // common
            totals[:, :, here] += weight * sums.totals.cpu()
            rows[:, here] += weight * torch.tensor([[sums.first_rows], [sums.other_rows]])
            highest, at = sums.numbers[PEAK].float().cpu(), sums.numbers[PEAK_AT].long().cpu()
            larger = highest > peak[here]
            peak[here] = torch.where(larger, highest, peak[here])
            peak_at[here] = torch.where(larger, at, peak_at[here])
        return ChannelStatistics(
            **vars(_means(totals.sum(dim=0), rows.sum(dim=0))),
            max_abs=peak,
            max_at=peak_at,
            after_first=_means(totals[1], rows[1]) if uses and self._knows_first else None,
        )


def _means(totals: torch.Tensor, rows: torch.Tensor) -> Means:
    """Means of sums `[3, in]` over rows `[in]`."""
    mean_abs, mean_sq, mean = (totals / rows.clamp(min=1)).float()
    return Means(mean_abs, mean_sq, rows.amax() if rows.numel() else torch.tensor(0), mean)


def _are_same(ones: Sequence[ChannelStatistics]) -> bool:
    """Whether parts of a parameter have the same input, as far as numbers tell."""
    return all(
        one is ones[0]
        or (bool(one.tokens == ones[0].tokens) and torch.allclose(one.mean_abs, ones[0].mean_abs, rtol=1e-5, atol=0.0))
        for one in ones
    )
