"""`nbos certs`: a private authority and the certificates of a cluster, for labs without an authority of their own."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Callable
from pathlib import Path

from nbos_cluster import certs
from nbos_cluster.certs import CertError

from .certbook import SOON, CertBook, Entry, wanted


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "init": _init,
        "issue": _issue,
        "renew": _renew,
        "show": _show,
    }
    try:
        return verbs[options.verb](options)
    except (CertError, OSError) as err:
        print(f"nbos certs: {err}", file=sys.stderr)
        return 1


def _init(options: argparse.Namespace) -> int:
    book = CertBook(options.dir, options.ca_key)
    passphrase = _new_passphrase(options)
    facts = book.init(options.name, options.days, passphrase)
    print(f"made the authority {facts.common!r} in {book.ca_cert.parent}, until {facts.ends:%Y-%m-%d}")
    how = "encrypted" if passphrase else "not encrypted"
    print(f"its key, {how}: {book.ca_key}. Whoever has it can become anybody: keep it off the servers, and back it up")
    return 0


def _issue(options: argparse.Namespace) -> int:
    asked = wanted(options.role, options.hosts)
    book = CertBook(options.dir, options.ca_key)
    authority = book.authority(_passphrase(book, options))
    for one in asked:
        print(book.issue(one, authority, options.days, options.replace))
    print("copy each folder to where its process runs, whole; it needs nothing else of this directory")
    return 0


def _renew(options: argparse.Namespace) -> int:
    book = CertBook(options.dir, options.ca_key)
    for name in options.names:
        book.facts(name)
    due = options.names or [e.name for e in book.entries() if e.facts and e.facts.days_left <= options.within]
    if not due:
        print(f"nothing to renew: no certificate ends within {options.within} days")
        return 0
    authority = book.authority(_passphrase(book, options))
    for name in due:
        print(book.renew(name, authority, options.days))
    print(
        "copy the folders to where they belong. etcd reads new files by itself; restart gateway and daemons one by one"
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    book = CertBook(options.dir)
    entries = book.entries()
    authority = certs.read(book.ca_cert)
    ends_soon = authority.days_left < SOON
    if options.json:
        print(json.dumps([_plain(entry) for entry in entries], indent=2))
    else:
        print(f"authority {authority.common!r} until {authority.ends:%Y-%m-%d} ({authority.days_left} days)")
        for entry in entries:
            print(_line(entry))
    if ends_soon:
        print(f"the authority ends on {authority.ends:%Y-%m-%d}: make another one in a new directory", file=sys.stderr)
    return 1 if ends_soon or any(entry.problem or entry.warning for entry in entries) else 0


def _line(entry: Entry) -> str:
    if entry.facts is None or entry.problem:
        return f"BAD  {entry.name}: {entry.problem}"
    facts = entry.facts
    names = f", {', '.join(facts.sans)}" if facts.sans else ""
    text = f"{entry.name:<24} {entry.role or '?':<8} {facts.common}{names}, until {facts.ends:%Y-%m-%d}"
    return f"WARN {text}: {entry.warning}" if entry.warning else f"ok   {text} ({facts.days_left} days)"


def _plain(entry: Entry) -> dict[str, object]:
    facts = entry.facts
    return {
        "name": entry.name,
        "role": entry.role,
        "common_name": facts.common if facts else "",
        "names": list(facts.sans) if facts else [],
        "until": facts.ends.isoformat() if facts else "",
        "days_left": facts.days_left if facts else 0,
        "problem": entry.problem,
        "warning": entry.warning,
    }


def _new_passphrase(options: argparse.Namespace) -> bytes | None:
    if options.passphrase_file is not None:
        return _from_file(options.passphrase_file)
    if not options.encrypt:
        return None
    first = _ask("passphrase for the authority's key: ")
    if _ask("again: ") != first:
        raise CertError("the two passphrases differ; nothing was made")
    return first


def _passphrase(book: CertBook, options: argparse.Namespace) -> bytes | None:
    if not book.ca_cert.exists() or not book.key_is_encrypted():
        return None
    if options.passphrase_file is not None:
        return _from_file(options.passphrase_file)
    return _ask(f"passphrase of {book.ca_key}: ")


def _from_file(path: Path) -> bytes:
    line = path.read_bytes().splitlines()[:1]
    if not line or not line[0]:
        raise CertError(f"{path} holds no passphrase in its first line")
    return line[0]


def _ask(prompt: str) -> bytes:
    if not sys.stdin.isatty():
        raise CertError("a passphrase is needed and there is no terminal to ask at; use --passphrase-file FILE")
    typed = getpass.getpass(prompt)
    if not typed:
        raise CertError("an empty passphrase protects nothing")
    return typed.encode()
