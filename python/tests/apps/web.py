"""Web functions as a user would write them, for the tests of the web hook."""

import asyncio
import contextlib
import os
import time

import modal
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse

app = modal.App("web")


def make_fastapi() -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        await asyncio.sleep(0.05)
        print("lifespan started", flush=True)
        yield {"model": "loaded", "requests": []}
        print("lifespan ended", flush=True)

    web = FastAPI(lifespan=lifespan)

    @web.get("/hello")
    async def hello(name: str = "you"):
        return {"hello": name}

    @web.get("/scope")
    async def scope(request: Request):
        return {
            "client": list(request.client),
            "url": str(request.url),
            "headers": dict(request.headers),
            "model": request.state.model,
            "state": sorted(request.scope["state"]),
            "loop": type(asyncio.get_running_loop()).__module__,
        }

    @web.get("/taint")
    async def taint(request: Request):
        before = hasattr(request.state, "tainted")
        request.state.tainted = True
        return {"before": before}

    @web.post("/echo")
    async def echo(request: Request):
        return {"length": len(await request.body())}

    @web.get("/stream")
    async def stream():
        async def parts():
            for number in range(3):
                yield f"part {number}\n"
                await asyncio.sleep(0.2)

        return StreamingResponse(parts(), media_type="text/plain")

    @web.get("/sync")
    def sync():
        time.sleep(0.5)
        return {"sync": True}

    @web.get("/slow")
    async def slow(seconds: float):
        print("slow begins", flush=True)
        try:
            await asyncio.sleep(seconds)
        finally:
            print("slow ends", flush=True)
        return {"slow": seconds}

    @web.get("/block")
    async def block(seconds: float):
        time.sleep(seconds)  # noqa: ASYNC251 - the mistake that users make
        return {"blocked": seconds}

    @web.get("/raise")
    async def fail():
        raise RuntimeError("a route that raises")

    @web.websocket("/ws")
    async def websocket(ws: WebSocket):
        await ws.accept()
        await ws.send_json({"client": list(ws.client), "scheme": ws.url.scheme, "model": ws.state.model})
        while True:
            await ws.send_text((await ws.receive_text()).upper())

    return web


@app.function()
@modal.asgi_app()
def fastapi_app():
    return make_fastapi()


@app.function()
@modal.fastapi_endpoint()
def endpoint(name: str = "you"):
    return {"endpoint": name}


@app.function()
@modal.wsgi_app()
def flask_app():
    from flask import Flask, request

    web = Flask("flask_app")

    @web.get("/hello")
    def hello():
        return {"hello": request.args.get("name"), "remote": request.remote_addr, "scheme": request.scheme}

    return web


@app.function()
@modal.asgi_app()
def raw_app():
    """An app without a framework: nothing but the runtime stands between its exception and the client."""

    async def raw(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        if scope["path"] == "/raise":
            raise ValueError("raw app raises")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"raw"})

    return raw


@app.function()
@modal.asgi_app()
def lifespan_fails():
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        raise RuntimeError("the model is missing")
        yield

    return FastAPI(lifespan=lifespan)


@app.cls()
class Shop:
    @modal.enter()
    def load(self):
        self.stock = 3

    @modal.exit()
    def close(self):
        print("shop closed", flush=True)

    @modal.asgi_app()
    def site(self):
        web = FastAPI()

        @web.get("/stock")
        def stock():
            return {"stock": self.stock}

        return web

    @modal.fastapi_endpoint()
    def price(self, item: str):
        return {"item": item, "price": self.stock * 10}

    @modal.method()
    def restock(self, amount: int) -> int:
        self.stock += amount
        return self.stock

    @modal.wsgi_app()
    def legacy(self):
        def legacy_app(environ, start_response):
            start_response("200 OK", [("content-type", "text/plain")])
            return [f"pid {os.getpid()}".encode()]

        return legacy_app


@app.cls()
class SlowStart:
    @modal.enter()
    async def a_connect(self):
        await asyncio.sleep(0.01)

    @modal.enter()
    def b_load(self):
        print("loading", flush=True)
        time.sleep(50)

    @modal.asgi_app()
    def site(self):
        return FastAPI()
