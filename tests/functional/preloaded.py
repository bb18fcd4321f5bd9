"""`megatron-dynmix` in a process that has loaded everything already: each command is a fork of it.

Loading torch and Megatron-Core takes seconds, and the docs have many commands. `python preloaded.py SOCKET`
serves; `CLIENT`, a script that stands in for the console script and for `python -m megatron_dynmix`, hands
over arguments, folder, environment and its three standard streams, and ends with the command's exit code.
Ranks that a command starts are forks too.
"""

import array
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

CLIENT = """#!{python} -ISs
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    streams = array.array("i", [0, 1, 2])
    arguments = sys.argv[3:] if sys.argv[1:3] == ["-m", "megatron_dynmix"] else sys.argv[1:]
    call = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    server.sendmsg([len(call).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(call)
    code = server.recv(1)
    sys.exit(code[0] if code else 1)
"""


def serve(address: Path) -> None:
    """Answer until killed."""
    from megatron_dynmix import platform

    platform.start()
    import torch._dynamo  # noqa: F401  which the first step would load

    import megatron_dynmix.commands.planning
    import megatron_dynmix.training.run  # noqa: F401
    from megatron_dynmix.cli import main
    from megatron_dynmix.job import launch

    launch.subprocess = SimpleNamespace(Popen=ForkedRank)
    gc.freeze()  # the collector of a fork need not look through what was loaded here
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        while True:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    server.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    client.sendall(bytes([_answer(client, main)]))
                    os._exit(0)


def _answer(client, main) -> int:
    """Run the command that the client asks for in its place."""
    streams = array.array("i")
    length, [(_, _, sent)], _, _ = client.recvmsg(4, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(sent)
    arguments, folder, environment = json.loads(client.makefile("rb").read(int.from_bytes(length, "big")))
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    return _code_of(main, arguments, environment)


def _code_of(main, arguments, environment) -> int:
    """Exit code of a command, its streams written out."""
    os.environ.clear()
    os.environ.update(environment)
    try:
        return main(arguments)
    except SystemExit as end:  # argparse's
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class ForkedRank:
    """What `launch_ranks` needs of `subprocess.Popen`, for `python -m megatron_dynmix ...`."""

    def __init__(self, command, *, env, **same_for_every_fork):
        from megatron_dynmix.cli import main

        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os._exit(_code_of(main, command[command.index("megatron_dynmix") + 1 :], env))

    def poll(self):
        return self._waited(os.WNOHANG)

    def wait(self):
        return self._waited(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def _waited(self, options):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
