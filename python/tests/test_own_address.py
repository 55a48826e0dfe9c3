"""The runtime finds the container's own address also where its kernel does not tell it."""

import subprocess
import sys
import textwrap

from fake_platform import LAUNCHER

# As older releases of gVisor answer.
WITHOUT_THE_CALL = """
    import errno, fcntl, sys
    sys.path.insert(0, {package!r})
    answers = fcntl.ioctl
    def ioctl(descriptor, request, *arguments):
        if request == 0x8915:
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        return answers(descriptor, request, *arguments)
    fcntl.ioctl = ioctl
"""


def run(code: str) -> str:
    script = textwrap.dedent(WITHOUT_THE_CALL).format(package=str(LAUNCHER.parent.parent)) + textwrap.dedent(code)
    environment = {"MODAL_SERVER_URL": "http://127.0.0.1:1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    return done.stdout + done.stderr


def test_the_address_is_found_without_the_call():
    code = """
        import modal._runtime.user_code_imports as imports
        from ionian_container import own_address
        imports.construct_webhook_callable = lambda: __import__("modal._runtime.asgi", fromlist=["x"]).get_ip_address
        own_address.install()
        assert "modal._runtime.asgi" not in sys.modules
        for _ in range(2):
            get_ip_address = imports.construct_webhook_callable()
            assert get_ip_address(b"eth0") == "127.0.0.1", get_ip_address(b"eth0")
        try:
            get_ip_address(b"eth1")
        except OSError as error:
            print(error.errno)
    """
    assert run(code) == "25\n"


def test_nothing_is_touched_where_the_kernel_answers():
    code = """
        fcntl.ioctl = lambda *_: b""
        import modal._runtime.user_code_imports as imports
        from ionian_container import own_address
        before = imports.construct_webhook_callable
        own_address.install()
        assert imports.construct_webhook_callable is before
    """
    assert run(code) == ""


def test_a_client_that_is_built_otherwise_is_left_alone():
    code = """
        import modal._runtime.user_code_imports as imports
        from ionian_container import own_address
        del imports.construct_webhook_callable
        own_address.install()
    """
    assert run(code).startswith("ionian: this version of the client makes web endpoints in an unknown way")
