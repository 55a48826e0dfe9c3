"""One function with an allow list, which a test fills in."""

import modal

app = modal.App("one-list", image=modal.Image.debian_slim())


@app.function(experimental_options={"ionian.outbound_cidr_allowlist": "RANGES"})
def nothing() -> None:
    pass
