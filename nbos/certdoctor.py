"""What `nbos doctor` says of certificates: those of `nbos up`, and those of a cluster (`nbos doctor --certs DIR`)."""

from __future__ import annotations

from pathlib import Path

from nbos_cluster.certs import CertError

from .certbook import CertBook, Entry, inspect
from .doctor import _MARKS, Finding
from .state import StateDir


def doctor_of_certs(path: Path) -> int:
    """Print what there is to say of the certificates in `path`; the exit status: 1 when something is bad."""
    findings = check_cert_book(path)
    for finding in findings:
        print(f"[{_MARKS[finding.level]}] {finding.text}")
    return 1 if any(finding.level == "bad" for finding in findings) else 0


def check_own_certs(state: StateDir) -> Finding:
    """Those that `nbos up` made for itself; it renews them at its start."""
    folder = state.tls
    names = sorted(path.stem for path in folder.glob("*.pem") if path.stem != "ca")
    if not names:
        return Finding("good", "certificates will be made by `nbos up`")
    ca = folder / "ca.pem"
    entries = [inspect(name, folder / f"{name}.pem", folder / f"{name}.key", ca, ca) for name in names]
    for entry in entries:
        if entry.problem:
            return Finding("bad", f"certificate {entry.name}: {entry.problem}; or delete {folder} and start `nbos up`")
    ending = [entry.name for entry in entries if entry.warning]
    if ending:
        return Finding("note", f"certificates end soon: {', '.join(ending)}; start `nbos up` again, it makes new ones")
    return Finding("good", f"{len(entries)} certificates of `nbos up`, good for {_days(entries)} days at least")


def _days(entries: list[Entry]) -> int:
    return min((entry.facts.days_left for entry in entries if entry.facts is not None), default=0)


def check_cert_book(path: Path) -> list[Finding]:
    """The cluster's certificates: whether they hold together, are who they should be, and last."""
    try:
        entries = CertBook(path).entries()
    except CertError as err:
        return [Finding("bad", str(err))]
    findings = []
    for entry in entries:
        if entry.problem or entry.ended:
            findings.append(Finding("bad", f"certificate {entry.name}: {entry.problem or entry.warning}"))
        elif entry.warning:
            findings.append(Finding("note", f"certificate {entry.name}: {entry.warning}"))
        elif entry.facts is not None and not _named_right(entry):
            who = entry.facts.common
            findings.append(
                Finding("bad", f"certificate {entry.name} is {who}'s: etcd will not know its process by it")
            )
    missing = [role for role in ("etcd", "gateway", "daemon", "admin") if role not in {e.role for e in entries}]
    if missing:
        findings.append(
            Finding("note", f"no certificate in {path} for: {', '.join(missing)}; see: nbos certs issue -h")
        )
    good = f"{len(entries)} certificates in {path}, good for {_days(entries)} days at least"
    return findings or [Finding("good", good)]


def _named_right(entry: Entry) -> bool:
    """Whether its folder's name says whose it is."""
    if entry.role == "etcd":
        return entry.name.startswith("etcd-")
    return entry.facts is not None and entry.name == (entry.facts.common if entry.role == "daemon" else entry.role)
