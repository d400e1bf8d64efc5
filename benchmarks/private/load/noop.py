"""The yardstick: FastAPI with one endpoint that does nothing, on uvicorn with h11: `python noop.py PORT`."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

app = FastAPI(openapi_url=None)


@app.post("/v1/score", response_model=None)
async def nothing(request: Request) -> Response:
    """Reads the body and says so."""
    await request.body()
    return Response(b'{"ok":true}', media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http="h11",
        access_log=False,
        log_level="error",
        backlog=2048,
    )
