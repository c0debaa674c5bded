"""How far prepare.py has come: a bar on a terminal, a plain line every few seconds in a pipe; on standard error."""

import sys
import time
from collections.abc import Sequence

from .workspace import Progress

BAR_WIDTH = 24
BAR_EVERY_S = 0.1
LINE_EVERY_S = 5.0


class ProgressBar:
    """Speeds are of this process alone; the share is of all documents."""

    def __init__(self, rows: Sequence[int], begin: Progress, what: str) -> None:
        """`rows`: documents in each source."""
        self.rows, self.what = rows, what
        self.total_rows = max(sum(rows), 1)
        self.begin_share = self._share(begin)
        self.begin_bytes, self.begin_tokens = begin.text_bytes, sum(begin.tokens)
        self.begin_s = self.shown_s = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def _share(self, at: Progress) -> float:
        return (sum(self.rows[: at.source]) + at.row) / self.total_rows

    def show(self, at: Progress, tokens: int) -> None:
        """Show the place and the number of tokens so far, when it is time."""
        now_s = time.monotonic()
        ended = at.source == len(self.rows)
        if now_s - self.shown_s < (BAR_EVERY_S if self.terminal else LINE_EVERY_S) and not ended:
            return
        self.shown_s = now_s
        took_s = max(now_s - self.begin_s, 1e-9)
        share = self._share(at)
        left_s = (1 - share) * took_s / max(share - self.begin_share, 1e-9)
        line = (
            f"{share:4.0%}  {at.text_bytes / 1e6:,.0f} MB, {tokens / 1e6:,.1f} M tokens  "
            f"{(at.text_bytes - self.begin_bytes) / took_s / 1e6:.1f} MB/s, "
            f"{(tokens - self.begin_tokens) / took_s:,.0f} tok/s, "
            f"{f'{took_s:.0f} s' if ended else 'ETA ' + _clock(left_s)} ({self.what})"
        )
        if self.terminal:
            filled = round(share * BAR_WIDTH)
            print(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
