"""Waivers: known failures of a backend that are excused for a while, each with a reason and an end.

A backend carries them in `waivers.toml` beside its entry module:

    [[waiver]]
    id = "rope-long-positions"
    cases = "acme/rope/*/position_1000000/*"
    reason = "known bug"              # or "hardware limit", "specification"
    link = "https://example.org/issues/17"
    approver = "A. Engineer"
    date = 2026-11-01
    expires = 2027-02-01
    observed = "R3 is 6.1"
"""

import datetime
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase

LONGEST_DAYS = 180
REASONS = ("known bug", "hardware limit", "specification")
FIELDS = {"id", "cases", "reason", "link", "approver", "date", "expires", "observed"}
OPTIONAL = {"link", "device"}


class WaiverError(ValueError):
    """A waivers file that is not one."""


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """One excuse.

    Args:
        id: Its name.
        cases: A pattern of case ids, as fnmatch reads it.
        reason: One of `REASONS`.
        approver: Who answers for it.
        date: From when.
        expires: Until when, at most 180 days later.
        observed: What was seen.
        link: Where it is followed up; needed for a known bug.
        device: A pattern of "device arch" that it is confined to.
    """

    id: str
    cases: str
    reason: str
    approver: str
    date: datetime.date
    expires: datetime.date
    observed: str
    link: str = ""
    device: str = "*"

    def excuses(self, case_id: str, device: str) -> bool:
        """Whether it is about this case on this device."""
        return fnmatchcase(case_id, self.cases) and fnmatchcase(device, self.device)

    def record(self) -> dict[str, str]:
        """For the report."""
        return {name: str(getattr(self, name)) for name in self.__dataclass_fields__}


def parse(text: str, where: str) -> tuple[Waiver, ...]:
    """The waivers of a file; WaiverError says what is wrong with which."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WaiverError(f"{where}: {error}") from None
    rows = content.pop("waiver", [])
    if content or not isinstance(rows, list):
        raise WaiverError(f"{where}: holds {', '.join(content) or 'waiver'}; a waivers file is a list of [[waiver]]")
    waivers = tuple(waiver_of(row, f"{where}: waiver {number}") for number, row in enumerate(rows, 1))
    names = [waiver.id for waiver in waivers]
    if len(set(names)) < len(names):
        raise WaiverError(f"{where}: two waivers have one id")
    return waivers


def waiver_of(row: dict[str, object], where: str) -> Waiver:
    """One waiver, checked."""
    if missing := FIELDS - OPTIONAL - row.keys():
        raise WaiverError(f"{where}: lacks {', '.join(sorted(missing))}")
    if unknown := row.keys() - FIELDS - OPTIONAL:
        raise WaiverError(f"{where}: does not take {', '.join(sorted(unknown))}")
    for name, value in row.items():
        kind = datetime.date if name in ("date", "expires") else str
        if type(value) is not kind or not value:
            raise WaiverError(f"{where}: {name} must be a {kind.__name__}; got {value!r}")
    waiver = Waiver(**row)  # type: ignore[arg-type]  # every field was checked above
    if waiver.reason not in REASONS:
        raise WaiverError(f"{where}: reason must be one of {', '.join(REASONS)}; got {waiver.reason!r}")
    if waiver.reason == "known bug" and not waiver.link:
        raise WaiverError(f"{where}: a known bug has a link")
    if not 0 <= (waiver.expires - waiver.date).days <= LONGEST_DAYS:
        raise WaiverError(f"{where}: expires must lie at most {LONGEST_DAYS} days after date")
    if not waiver.cases.strip("*?/"):
        raise WaiverError(f"{where}: cases must name something; got {waiver.cases!r}")
    return waiver
