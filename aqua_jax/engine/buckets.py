"""The one place that knows the shapes a step is compiled for.

Two programs make a step (see `runner`): the forward pass, whose shape is the number of flat
tokens T, and the sampling, whose shape is the number of rows R that want a token. Sequence
capacity S and page-table width are constants of an engine, so they multiply nothing.

Where ops skip rows past the valid ones (the FFI implementations), a coarse table costs nothing
but a few elementwise rows; where they compute padding (plain XLA), the table is finer.
"""

from __future__ import annotations

import bisect
import dataclasses


def _ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes, size = [], first
    while size < last:
        sizes.append(size)
        size *= factor
    return (*sizes, last)


@dataclasses.dataclass(frozen=True)
class BucketTable:
    """Compiled sizes, ascending.

    Attributes:
      tokens: values of T; the last is the step's token budget.
      rows: values of R; the last is the sequence capacity.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    @staticmethod
    def build(
        step_tokens: int, max_num_seqs: int, *, deterministic: bool, skips_padding: bool
    ) -> BucketTable:
        """Choose the table.

        Args:
          step_tokens: most tokens in one step.
          max_num_seqs: most sequences in one step.
          deterministic: one size for everything, so that every matmul has the same row count.
          skips_padding: whether the ops in use skip rows past the valid ones.
        """
        if deterministic:
            return BucketTable((step_tokens,), (max_num_seqs,))
        factor = 4 if skips_padding else 2
        return BucketTable(
            _ladder(1, step_tokens, factor), _ladder(1, max_num_seqs, factor)
        )

    def token_bucket(self, count: int) -> int:
        """Smallest compiled T that holds `count` tokens."""
        return self.tokens[bisect.bisect_left(self.tokens, count)]

    def row_bucket(self, count: int) -> int:
        """Smallest compiled R that holds `count` rows."""
        return self.rows[bisect.bisect_left(self.rows, count)]
