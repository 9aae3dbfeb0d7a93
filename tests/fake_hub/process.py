"""The process of the loopback Hub: ``python -m fake_hub.process``.

It prints the address of its control port as a line of JSON. ``POST /serve`` names a folder, for which it opens the
ports of the Hub and of the store, and that of the CAS when Xet is asked for; it serves one folder at a time. It ends
when its standard input does, so it cannot outlive the tests that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from fake_hub import browse, community, curation, jobs, repos, store, uploads
from fake_hub.state import HubState
from fake_hub.traffic import Fault, Traffic
from fake_hub.wire import Cas, Exchange, Failure, Routes, Server, Site


class Serving:
    """The servers of one folder, each on a port of its own."""

    def __init__(self, root: Path) -> None:
        self.state = HubState(root)
        self.traffic = Traffic()
        endpoints = Routes()
        for module in (curation, jobs, repos, community, uploads, browse):
            endpoints.extend(module.routes)
        self.hub = Server("hub", endpoints.respond, self.traffic)
        self.store = Server("store", store.routes.respond, self.traffic)
        self._lock = threading.Lock()
        self._cas: Any = None
        self.hub.site = self.store.site = Site(self.state, self.hub.address, self.store.address, self.cas)
        self.hub.start()
        self.store.start()

    def cas(self) -> Cas:
        """The CAS, started when it is first asked for."""
        with self._lock:
            if self._cas is None:
                from fake_hub.cas import Cas as Implementation

                self._cas = Implementation(self.state.root / "cas")
                self._cas.take_fault = self._take_fault
                self._cas.record = self.traffic.record
                self._cas.start()
            found: Cas = self._cas
            return found

    def _take_fault(self, method: str, path: str) -> Fault | None:
        return self.traffic.take_fault("cas", method, path)

    def stop(self) -> None:
        self.hub.stop()
        self.store.stop()
        with self._lock:
            if self._cas is not None:
                self._cas.stop()


class Control:
    """What ``hub.server.LoopbackHub`` asks for."""

    def __init__(self) -> None:
        self._serving: Serving | None = None

    def respond(self, exchange: Exchange) -> None:
        match exchange.command, exchange.clean_path:
            case "POST", "/serve":
                self._serving = Serving(Path(exchange.json_body()["root"]))
                exchange.answer({"hub": self._serving.hub.address, "store": self._serving.store.address})
            case "POST", "/stop":
                serving, self._serving = self._current(), None
                threading.Thread(target=serving.stop).start()
                exchange.answer(serving.traffic.errors())
            case "POST", "/faults":
                self._current().traffic.add_faults(Fault.from_json(raw) for raw in exchange.json_body()["faults"])
                exchange.answer({})
            case "DELETE", "/faults":
                self._current().traffic.clear_faults()
                exchange.answer({})
            case "GET", "/log":
                exchange.answer([request.to_json() for request in self._current().traffic.log()])
            case "GET", "/cas":
                exchange.answer(self._current().cas().endpoint)
            case _:
                raise Failure(404, None, "no such control")

    def _current(self) -> Serving:
        if self._serving is None:
            raise Failure(409, None, "nothing is served")
        return self._serving


def main() -> None:
    control = Server("control", Control().respond, Traffic())
    control.start()
    print(json.dumps(control.address), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
