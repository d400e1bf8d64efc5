"""The obvious service: FastAPI, sentence-transformers, one `encode` a question. Ours is measured against it.

python naive.py MODEL_FOLDER PORT
"""

from __future__ import annotations

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Question(BaseModel):
    texts: list[str]


def main() -> None:
    model = SentenceTransformer(sys.argv[1], device="cpu")
    model.tokenizer.backend_tokenizer.no_padding()  # the packaged file pads to 128; the library pads a batch
    model.max_seq_length = 256
    app = FastAPI()

    @app.post("/score")
    def score(question: Question) -> dict[str, float]:
        vectors = model.encode(question.texts, normalize_embeddings=True, show_progress_bar=False)
        cosines = np.clip(vectors @ vectors.T, 0, 1)
        return {"s_path": float(cosines[np.triu_indices(len(vectors), 1)].mean())}

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")


if __name__ == "__main__":
    main()
