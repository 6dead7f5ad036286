"""`nbos certs` as an admin uses it: what it makes, what it refuses to write over, what it warns of; and the doctor."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from nbos import certdoctor, cli, doctor
from nbos.layout import Layout, UpOptions
from nbos.state import StateDir
from nbos_cluster import access, certs

from .test_command import GOOD


class Book:
    """`nbos certs` on a directory of its own."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self._capsys = path, capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        status = cli.main(["certs", *words, "--dir", str(self.path)])
        self.out, self.err = self._capsys.readouterr()
        return status

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.path)): p.read_bytes() for p in self.path.rglob("*") if p.is_file()}


@pytest.fixture
def book(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Book:
    found = Book(tmp_path / "certs", capsys)
    assert found("init") == 0
    return found


def test_each_role_gets_the_name_that_etcd_knows_it_by(book: Book) -> None:
    assert book("issue", "etcd", "one,10.0.0.1", "two") == 0
    assert book("issue", "daemon", "host-a") == 0
    for role in ("gateway", "admin", "reader"):
        assert book("issue", role) == 0
    found = {folder.name: certs.read(folder / "cert.pem") for folder in book.path.glob("*/") if folder.name != "ca"}
    assert {name: facts.common for name, facts in found.items()} == {
        "etcd-one": access.MEMBER,
        "etcd-two": access.MEMBER,
        "daemon-host-a": access.daemon_user("host-a"),
        "gateway": access.GATEWAY,
        "admin": access.ROOT,
        "reader": access.READER,
    }
    assert {name for name, facts in found.items() if facts.server} == {"etcd-one", "etcd-two"}
    assert {"one", "10.0.0.1", "localhost", "127.0.0.1"} == set(found["etcd-one"].sans)
    assert book("show") == 0


def test_keys_are_for_their_owner_alone(book: Book) -> None:
    book("issue", "daemon", "a")
    keys = [book.path / "ca" / "ca.key", book.path / "daemon-a" / "key.pem"]
    assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600, 0o600]
    assert stat.S_IMODE((book.path / "daemon-a").stat().st_mode) == 0o700


def test_what_a_process_gets_does_not_hold_the_authoritys_key(book: Book) -> None:
    book("issue", "gateway")
    assert {path.name for path in (book.path / "gateway").iterdir()} == {"ca.pem", "cert.pem", "key.pem"}


def test_nothing_is_written_over_unless_asked_for(book: Book) -> None:
    book("issue", "etcd", "one")
    before = book.files()
    assert book("init") == 1
    assert "is there already" in book.err
    assert book("issue", "etcd", "one") == 0
    assert "kept" in book.out
    assert book("issue", "etcd", "one,10.0.0.9") == 1
    assert "does not name 10.0.0.9" in book.err
    assert "--replace" in book.err
    assert book.files() == before
    assert book("issue", "etcd", "one,10.0.0.9", "--replace") == 0
    assert "10.0.0.9" in certs.read(book.path / "etcd-one" / "cert.pem").sans


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("issue", "etcd"), "for which hosts"),
        (("issue", "gateway", "here"), "leave out here"),
        (("issue", "daemon", "a/../b"), "no host name"),
        (("issue", "etcd", "a,b c"), "no host name"),
        (("renew", "nobody"), "there is no certificate 'nobody'"),
        (("renew", "ca"), "there is no certificate 'ca'"),
        (("issue", "admin", "--ca-key", "/nowhere/ca.key"), "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(book: Book, words: tuple[str, ...], says: str) -> None:
    before = book.files()
    assert book(*words) == 1
    assert says in book.err
    assert book.files() == before


def test_without_an_authority_the_way_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Book(tmp_path / "none", capsys)
    for words in (("show",), ("issue", "admin"), ("renew",)):
        assert book(*words) == 1
        assert "nbos certs init" in book.err


def test_an_ending_certificate_is_warned_of_and_renewed_with_its_names(book: Book) -> None:
    book("issue", "etcd", "one,10.0.0.1", "--days", "5")
    book("issue", "gateway")
    gateway = (book.path / "gateway" / "cert.pem").read_bytes()
    assert book("show") == 1
    assert "nbos certs renew etcd-one" in book.out
    before = certs.read(book.path / "etcd-one" / "cert.pem")
    assert book("renew") == 0
    after = certs.read(book.path / "etcd-one" / "cert.pem")
    assert (after.sans, after.common, after.server) == (before.sans, before.common, before.server)
    assert after.days_left > 800
    assert (book.path / "gateway" / "cert.pem").read_bytes() == gateway
    assert book("show") == 0
    assert json.loads((book("show", "--json"), book.out)[1])[0]["name"] == "etcd-one"


def test_a_certificate_ends_no_later_than_its_authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Book(tmp_path / "certs", capsys)
    book("init", "--days", "40")
    book("issue", "admin", "--days", "800")
    assert certs.read(book.path / "admin" / "cert.pem").days_left <= 40


def test_a_passphrase_guards_the_authoritys_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Book(tmp_path / "certs", capsys)
    right, wrong, empty = tmp_path / "right", tmp_path / "wrong", tmp_path / "empty"
    right.write_text("correct horse\n")
    wrong.write_text("wrong\n")
    empty.write_text("\n")
    away = tmp_path / "stick"
    away.mkdir()
    where = ("--ca-key", str(away / "ca.key"))
    assert book("init", *where, "--passphrase-file", str(empty)) == 1
    assert book("init", *where, "--passphrase-file", str(right)) == 0
    assert b"ENCRYPTED" in (away / "ca.key").read_bytes()
    assert not (book.path / "ca" / "ca.key").exists()
    assert book("issue", "admin", *where, "--passphrase-file", str(wrong)) == 1
    assert "passphrase is another one" in book.err
    assert book("issue", "admin", *where) == 1
    assert "--passphrase-file" in book.err
    assert book("issue", "admin", *where, "--passphrase-file", str(right)) == 0
    assert book("show") == 0


def levels(path: Path) -> dict[str, str]:
    return {finding.text: finding.level for finding in certdoctor.check_cert_book(path)}


def test_the_doctor_looks_at_names_keys_and_ends(book: Book) -> None:
    for words in (("etcd", "one"), ("gateway",), ("admin",), ("daemon", "a", "b")):
        book("issue", *words)
    assert list(levels(book.path).values()) == ["good"]
    assert cli.main(["doctor", "--certs", str(book.path)]) == 0
    (book.path / "gateway" / "key.pem").chmod(0o644)
    assert cli.main(["doctor", "--certs", str(book.path)]) == 1
    assert "chmod 600" in next(iter(levels(book.path)))
    (book.path / "gateway" / "key.pem").write_bytes((book.path / "admin" / "key.pem").read_bytes())
    assert "is not the key of" in next(iter(levels(book.path)))
    book("issue", "gateway", "--replace")
    (book.path / "daemon-a").rename(book.path / "daemon-c")
    assert levels(book.path) == {"certificate daemon-c is daemon-a's: etcd will not know its process by it": "bad"}
    (book.path / "daemon-c").rename(book.path / "daemon-a")
    book("issue", "daemon", "b", "--days", "9", "--replace")
    assert list(levels(book.path).values()) == ["note"]
    other = Book(book.path.parent / "other", book._capsys)
    other("init")
    other("issue", "gateway")
    (book.path / "gateway" / "cert.pem").write_bytes((other.path / "gateway" / "cert.pem").read_bytes())
    assert any("was not issued by the authority" in text for text in levels(book.path))


def test_the_doctor_looks_at_the_certificates_of_nbos_up(tmp_path: Path) -> None:
    state = StateDir.at(tmp_path)
    assert doctor.check_own_certs(state).level == "good"
    state.create()
    Layout(state, UpOptions(hosts=2), {}, GOOD).make_certificates()
    assert doctor.check_own_certs(state).level == "good"
    (state.tls / "host-1.key").chmod(0o640)
    assert doctor.check_own_certs(state).level == "bad"


def test_a_certificate_of_an_older_nbos_up_becomes_its_user_in_etcd(tmp_path: Path) -> None:
    state = StateDir.at(tmp_path)
    state.create()
    certs.make_ca(state.tls)
    certs.issue(state.tls, "up")
    Layout(state, UpOptions(hosts=1), {}, GOOD).make_certificates()
    found = {path.stem: certs.read(path).common for path in state.tls.glob("*.pem") if path.stem != "ca"}
    assert found == {"up": "root", "gateway": "gateway", "etcd": "etcd-member", "host-1": "daemon-host-1"}


def test_the_doctor_tells_whether_messages_can_be_encrypted() -> None:
    def missing() -> bool:
        raise ImportError("zmq")

    assert doctor.check_curve(lambda: True).level == "good"
    assert doctor.check_curve(lambda: False).level == "bad"
    assert "pip install" in doctor.check_curve(missing).text
