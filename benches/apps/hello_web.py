"""The app that both sides of the comparison serve: on bare uvicorn as it is, on the platform by `hello.py`."""

from fastapi import FastAPI

web = FastAPI()


@web.get("/hello")
async def hello():
    return {"hello": "Ionian"}
