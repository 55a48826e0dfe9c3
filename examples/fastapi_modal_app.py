# fastapi_modal_app.py
import modal
image = (
    modal.Image.debian_slim()
    .pip_install(
        "fastapi[standard]",
        "uvicorn[standard]",
        # Add your app deps here:
        "pydantic",
        "requests",
    )
)
app = modal.App("fastapi-on-modal", image=image)
# fastapi_modal_app.py (continued)
from fastapi import FastAPI
@app.function()
@modal.asgi_app()
def fastapi_app():
    web_app = FastAPI(title="My FastAPI on Modal")
    @web_app.get("/healthz")
    async def healthz():
        return {"status": "ok"}
    @web_app.get("/hello")
    async def hello(name: str = "world"):
        return {"message": f"Hello, {name}!"}
    return web_app
