"""Web endpoints of every kind."""

import asyncio
import hashlib
import subprocess
import sys

import modal

# The image of examples/fastapi_modal_app.py, and so the same layers.
image = modal.Image.debian_slim().pip_install(
    "fastapi[standard]",
    "uvicorn[standard]",
    # Add your app deps here:
    "pydantic",
    "requests",
)
app = modal.App("web", image=image)


@app.function()
@modal.concurrent(max_inputs=20)
@modal.asgi_app()
def api():
    from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
    from fastapi.responses import Response, StreamingResponse

    web_app = FastAPI()
    # Set by one request and waited for by another: nothing but the caller decides when the stream goes on.
    go_on = asyncio.Event()

    @web_app.get("/hello")
    async def hello(name: str = "world"):
        return {"message": f"Hello, {name}!"}

    @web_app.post("/upload")
    async def upload(request: Request):
        digest, size = hashlib.sha256(), 0
        async for piece in request.stream():
            digest.update(piece)
            size += len(piece)
        return {"size": size, "sha256": digest.hexdigest()}

    @web_app.get("/download")
    async def download(size: int):
        return Response(b"x" * size, media_type="application/octet-stream")

    @web_app.get("/stream")
    async def stream():
        async def pieces():
            yield b"first"
            await asyncio.wait_for(go_on.wait(), 30)
            yield b"second"

        return StreamingResponse(pieces(), media_type="text/plain")

    @web_app.post("/go-on")
    async def let_go_on():
        go_on.set()

    @web_app.get("/seen")
    async def seen(request: Request):
        headers = [[name, value] for name, value in request.headers.items()]
        return {"url": str(request.url), "method": request.method, "headers": headers}

    @web_app.api_route("/status/{code}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    async def status(code: int, request: Request):
        return Response(request.method, status_code=code, headers={"x-app": "web"})

    @web_app.get("/served-by-uvicorn")
    async def served_by_uvicorn():
        # The web hook serves the app with it; the official data channel needs no server.
        return "uvicorn" in sys.modules

    @web_app.get("/boom")
    async def boom():
        raise RuntimeError("the app went boom")

    @web_app.websocket("/ws")
    async def echo(websocket: WebSocket):
        await websocket.accept()
        try:
            while True:
                message = await websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                if message.get("text") is not None:
                    await websocket.send_text("echo " + message["text"])
                else:
                    await websocket.send_bytes(message["bytes"][::-1])
        except WebSocketDisconnect:
            return

    return web_app


@app.function(image=image.pip_install("flask"))
@modal.wsgi_app()
def flask_app():
    from flask import Flask, request

    web_app = Flask("web")

    @web_app.get("/hello")
    def hello():
        return {"message": f"Hello, {request.args.get('name', 'world')}!"}

    @web_app.post("/upload")
    def upload():
        return {"size": len(request.get_data())}

    return web_app


@app.function()
@modal.fastapi_endpoint(method="POST", docs=True)
def total(numbers: list[int]) -> dict:
    return {"total": sum(numbers)}


@app.function()
@modal.web_server(8000)
def files():
    subprocess.Popen(["python", "-m", "http.server", "8000", "--directory", "/usr/share/doc"])


@app.cls()
class Counter:
    @modal.enter()
    def start(self):
        self.count = 40

    @modal.fastapi_endpoint()
    def hits(self) -> dict:
        self.count += 1
        return {"hits": self.count}
