"""Membership in an etcd that wants certificates or a password, and one that will not have us."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess

import pytest

from adapt.config import EtcdSettings
from adapt.errors import ConfigError
from adapt.protocol.ids import WorkerId
from adapt.runtime.etcd_layout import Layout
from adapt.runtime.etcd_link import EtcdAwayError, EtcdLink, EtcdRefusedError
from adapt.runtime.membership_etcd import EtcdMembership
from adapt.runtime.registry import Listener
from adapt.runtime.registry_etcd import EtcdRegistry
from adapt.runtime.state import StateDirectory
from tests.faults.etcd import needs_etcd, running_etcd

pytestmark = [needs_etcd, pytest.mark.timeout(120)]
ADDRESS = "tcp://127.0.0.1:5999"
TTL_S = 2.0
WORKER = WorkerId("w1")


@contextlib.asynccontextmanager
async def registry(settings: EtcdSettings, directory):
    state = StateDirectory(directory)
    opened = EtcdRegistry(settings, state, lease_ttl_s=TTL_S)
    opened.watch(Listener(ended=lambda worker_id: None, renewed=lambda worker_id: None))
    try:
        yield opened
    finally:
        await opened.close()
        state.close()


async def found(settings: EtcdSettings) -> str:
    membership = EtcdMembership(settings, WORKER)
    try:
        async with asyncio.timeout(20):
            return await membership.find()
    finally:
        await membership.leave()


async def both_meet(settings: EtcdSettings, directory) -> None:
    async with registry(settings, directory) as opened:
        assert await opened.campaign() == 1
        opened.announce(ADDRESS)
        assert await found(settings) == ADDRESS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Of an authority, and signed by it one for 127.0.0.1 that serves for both ends."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority")
    openssl("req", *new_key, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=adapt")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl("x509", "-req", "-in", "request.pem", "-out", "cert.pem", *signing)
    return folder


def test_both_ends_show_certificates(certificates, tmp_path):
    ca, cert, key = (certificates / name for name in ("ca.pem", "cert.pem", "key.pem"))
    flags = ("--cert-file", str(cert), "--key-file", str(key), "--trusted-ca-file", str(ca), "--client-cert-auth")
    with running_etcd(tmp_path, flags=flags, settings={"ca": ca, "cert": cert, "key": key}) as etcd:
        asyncio.run(both_meet(etcd.settings(), tmp_path / "state"))
        for wrong in ({"cert": None, "key": None}, {"ca": None, "cert": None, "key": None}):
            link = EtcdLink(etcd.settings(**wrong), etcd.only.endpoint, timeout_s=2.0)
            with pytest.raises(EtcdAwayError):
                link.read("x")
            link.close()


def test_a_user_may_touch_nothing_but_the_cluster(tmp_path):
    with running_etcd(tmp_path) as etcd:
        etcd.protect("adapt", "secret", "/adapt/default/")
        allowed = etcd.settings(user="adapt", password="secret")
        asyncio.run(both_meet(allowed, tmp_path / "state"))
        link = EtcdLink(allowed, etcd.only.endpoint, timeout_s=2.0)
        with pytest.raises(EtcdRefusedError, match="permission denied"):
            link.read(Layout("other").term)
        link.close()


@pytest.mark.parametrize(
    "given", [{"user": None, "password": None}, {"user": "adapt", "password": "wrong"}, {"user": "nobody", "password": "secret"}]
)
def test_who_is_refused_is_told_so_and_does_not_wait(tmp_path, given):
    async def test(settings):
        async with registry(settings, tmp_path / "state") as opened:
            with pytest.raises(ConfigError, match="membership: etcd at"):
                await opened.campaign()
        with pytest.raises(ConfigError, match="membership: etcd at"):
            await found(settings)

    with running_etcd(tmp_path) as etcd:
        etcd.protect("adapt", "secret", "/adapt/default/")
        asyncio.run(test(etcd.settings(**given)))


def test_a_login_that_has_run_out_is_renewed(tmp_path):
    """etcd forgets who has logged in when it is started again; etcd3 would never log in anew."""

    async def test(etcd):
        settings = etcd.settings(user="adapt", password="secret")
        async with registry(settings, tmp_path / "state") as opened:
            await opened.campaign()
            etcd.only.kill()
            etcd.only.start()
            async with asyncio.timeout(20):
                while opened.counters()["etcd_resyncs"] < 2:  # noqa: ASYNC110  on another thread
                    await asyncio.sleep(0.05)

    with running_etcd(tmp_path) as etcd:
        etcd.protect("adapt", "secret", "/adapt/default/")
        asyncio.run(test(etcd))


def test_a_dispatcher_begins_without_etcd_and_is_found_when_it_is_back(tmp_path):
    async def test(etcd):
        async with registry(etcd.settings(), tmp_path / "state") as opened:
            assert await opened.campaign() == 1
            opened.raise_term(20)
        etcd.only.kill()
        async with registry(etcd.settings(), tmp_path / "state") as opened:
            assert await opened.campaign() == 21, "one more than its own highest"
            opened.announce(ADDRESS)
            finding = asyncio.create_task(found(etcd.settings()))
            etcd.only.start()
            assert await finding == ADDRESS
        assert etcd.keys()["/adapt/default/term"] == b"21"

    with running_etcd(tmp_path) as etcd:
        asyncio.run(test(etcd))
