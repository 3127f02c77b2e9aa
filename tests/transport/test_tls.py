"""TLS: both protocols by ALPN, client certificates, handshakes that fail, files that change."""

import asyncio
import errno
import ssl
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from kvstore.transport.tls import Tls, TlsFiles, build_context
from tests.transport.certificates import Authority, lock
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE, ClosedError, connected, talking
from tests.transport.running import eventually, serving
from tests.transport.service import PATH


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that clients trust."""
    return Authority.make(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsFiles:
    """A server's files."""
    certificate, key = authority.issue("server")
    return TlsFiles(certificate=certificate, key=key)


def never(trouble: str | None) -> None:
    """Told of changes that must not be."""
    raise AssertionError(trouble)


def client(authority: Authority, *protocols: str) -> ssl.SSLContext:
    """A client that trusts the CA."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


async def test_http2_by_alpn(authority: Authority, files: TlsFiles) -> None:
    """h2 is negotiated and served, also large messages both ways."""
    async with (
        serving(tls=Tls(files, never)) as running,
        connected(running.port, tls=client(authority, "h2")) as peer,
    ):
        secure = peer.writer.get_extra_info("ssl_object")
        assert isinstance(secure, ssl.SSLObject)
        assert (secure.selected_alpn_protocol(), secure.version()) == ("h2", "TLSv1.3")
        assert (await peer.call(PATH + "Echo", b"x" * 16_000)).messages == [b"x" * 16_000]
        assert (await peer.call(PATH + "Size", b"3000000")).messages == [bytes(3_000_000)]


async def test_grpcio(authority: Authority, files: TlsFiles) -> None:
    """Grpcio's client is served over TLS."""
    async with serving(tls=Tls(files, never)) as running:
        credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())

        def work() -> bytes:
            with grpc.secure_channel(f"localhost:{running.port}", credentials) as channel:
                call = channel.unary_unary(
                    PATH + "Echo", request_serializer=bytes, response_deserializer=bytes
                )
                answer: bytes = call(b"hello", timeout=PATIENCE)
                return answer

        assert await asyncio.to_thread(work) == b"hello"


@pytest.mark.parametrize("protocols", [(), ("http/1.1",), ("spdy/3", "http/1.1")])
async def test_http1_by_alpn(
    authority: Authority, files: TlsFiles, protocols: tuple[str, ...]
) -> None:
    """Clients that do not offer h2 are served HTTP/1.1."""
    async with serving(tls=Tls(files, never)) as running:
        context = client(authority, *protocols)
        async with talking(running.port, tls=context) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            async with asyncio.timeout(PATIENCE):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                assert (await reader.read()).endswith(b"hello\n")


async def test_alpn_where_only_http1_is_served(authority: Authority, files: TlsFiles) -> None:
    """A client that would rather speak HTTP/2 is not led into it by a listener that cannot."""
    async with serving(tls=Tls(files, never), http1_only=True) as running:
        context = client(authority, "h2", "http/1.1")
        async with talking(running.port, tls=context) as (reader, writer):
            secure = writer.get_extra_info("ssl_object")
            assert isinstance(secure, ssl.SSLObject)
            assert secure.selected_alpn_protocol() == "http/1.1"
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            async with asyncio.timeout(PATIENCE):
                assert (await reader.read()).endswith(b"hello\n")


async def test_client_certificates(authority: Authority, files: TlsFiles, tmp_path: Path) -> None:
    """Where required, clients without one of our CA, or with a revoked one, are refused."""
    good, bad = authority.issue("good"), authority.issue("bad")
    stranger = Authority.make(tmp_path, "other").issue("stranger")
    strict = replace(
        files,
        client_ca=authority.certificate,
        client_revocations=authority.revoke(bad[0]),
        require_client_certificate=True,
    )
    async with serving(tls=Tls(strict, never)) as running:
        for pair, served in ((good, True), (bad, False), (stranger, False), (None, False)):
            context = client(authority, "h2")
            if pair is not None:
                context.load_cert_chain(*pair)
            if served:
                async with connected(running.port, tls=context) as peer:
                    assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]
            else:
                with pytest.raises((ssl.SSLError, ClosedError, ConnectionError)):
                    async with connected(running.port, tls=context):
                        pass
        await eventually(lambda: running.server.stats().handshakes_failed == 3)
        await eventually(lambda: running.server.stats().connections == 0)


async def test_certificates_are_reloaded(authority: Authority, tmp_path: Path) -> None:
    """New files serve new handshakes; bad ones leave the old in place and are told once."""
    folder = tmp_path / "current"
    folder.mkdir()
    current = TlsFiles(certificate=folder / "tls.crt", key=folder / "tls.key")

    def install(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, (current.certificate, current.key), strict=True):
            fresh = target.with_suffix(".new")
            fresh.write_bytes(source.read_bytes())
            fresh.replace(target)

    told: list[str | None] = []
    install(authority.issue("first"))
    tls = Tls(current, told.append)

    async def name(port: int) -> object:
        async with connected(port, tls=client(authority, "h2")) as peer:
            certificate = peer.writer.get_extra_info("peercert")
            assert isinstance(certificate, dict)
            return certificate["subject"][0][0][1]

    async with serving(tls=tls) as running:
        assert await name(running.port) == "first"
        install(authority.issue("second"))
        assert await name(running.port) == "second"
        assert told == [None]
        current.key.write_text("half written")
        assert [await name(running.port), await name(running.port)] == ["second", "second"]
        (reason,) = told[1:]
        assert reason is not None
        assert reason.endswith(f"{current.key} holds no private key")
        current.key.unlink()
        assert [await name(running.port), await name(running.port)] == ["second", "second"]
        assert told[2:] == [f"cannot read {current.key}: No such file or directory"]
        install(authority.issue("third"))
        assert await name(running.port) == "third"
        assert told[3:] == [None]


async def test_certificates_are_tried_again(
    files: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that could not be read for want of something else are read by a later handshake."""
    certificate = tmp_path / "tls.crt"
    certificate.write_bytes(files.certificate.read_bytes())
    told: list[str | None] = []
    tls = Tls(replace(files, certificate=certificate), told.append)
    first = tls.context(http1_only=False)
    certificate.write_bytes(files.certificate.read_bytes() + b"\n")

    def exhausted(*_: object) -> ssl.SSLContext:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("kvstore.transport.tls.build_context", exhausted)
        assert tls.context(http1_only=False) is first
        assert tls.context(http1_only=False) is first
    assert told == ["cannot read certificates: Too many open files"]
    assert tls.context(http1_only=False) is not first
    assert told[1:] == [None]


async def test_handshakes_that_fail(authority: Authority, files: TlsFiles) -> None:
    """What is no handshake, or none in time, is closed and leaves nothing behind."""
    limits = replace(TEST_LIMITS, handshake_timeout=0.2)
    async with serving(limits, tls=Tls(files, never)) as running:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b""):
            async with talking(running.port) as (reader, writer):
                writer.write(words)
                async with asyncio.timeout(PATIENCE):
                    with_alert = await reader.read()
                assert len(with_alert) < 10
        await eventually(lambda: running.server.stats().connections == 0)
        assert running.server.stats().handshakes_failed == 2
        assert [peer.rpartition(":")[0] for peer, _ in running.handshakes] == ["127.0.0.1"] * 2
        first, second = (str(error) for _, error in running.handshakes)
        assert "HTTP_REQUEST" in first.upper().replace(" ", "_")
        assert "handshake" in second
        async with connected(running.port, tls=client(authority, "h2")) as peer:
            assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]


async def test_handshakes_under_way_are_ended(files: TlsFiles) -> None:
    """A stop does not wait for handshakes."""
    async with serving(tls=Tls(files, never)) as running, talking(running.port):
        await eventually(lambda: running.server.stats().connections == 1)
        async with asyncio.timeout(PATIENCE):
            await running.server.drain(0.0, message="stopped")


async def test_old_versions_are_refused(authority: Authority, files: TlsFiles) -> None:
    """TLS 1.1 and older are not spoken."""
    context = client(authority, "h2")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with (
        serving(tls=Tls(files, never)) as running,
        connected(running.port, tls=context) as peer,
    ):
        assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]
    assert build_context(files).minimum_version is ssl.TLSVersion.TLSv1_2


def test_required_certificates_need_an_authority(files: TlsFiles) -> None:
    """To require client certificates without a CA is a mistake that shows at once."""
    with pytest.raises(ssl.SSLError, match="no CA"):
        build_context(replace(files, require_client_certificate=True))


def test_key_under_a_password(files: TlsFiles, tmp_path: Path) -> None:
    """Nobody is asked for a password: the server would stop to wait for it."""
    key = tmp_path / "locked.key"
    lock(files.key, key)
    with pytest.raises(ssl.SSLError, match="password"):
        build_context(replace(files, key=key))


def test_directory_for_a_file(files: TlsFiles, tmp_path: Path) -> None:
    """The file that cannot be read is named, whichever it is."""
    for broken in (
        replace(files, certificate=tmp_path),
        replace(files, key=tmp_path),
        replace(files, client_ca=tmp_path),
    ):
        with pytest.raises(IsADirectoryError) as caught:
            build_context(broken)
        assert caught.value.filename == str(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    """Files that are not there show at once."""
    missing = TlsFiles(certificate=tmp_path / "a", key=tmp_path / "b")
    with pytest.raises(OSError, match="No such file"):
        Tls(missing, never)
