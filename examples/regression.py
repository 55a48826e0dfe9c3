"""A model behind a function and behind HTTP.

modal deploy regression.py
"""

import modal

image = modal.Image.debian_slim().pip_install("scikit-learn", "fastapi[standard]")
app = modal.App("regression", image=image)


@app.cls()
class Regression:
    @modal.enter()
    def train(self):
        import numpy
        from sklearn.linear_model import LinearRegression

        x = numpy.arange(100, dtype=float).reshape(-1, 1)
        self.model = LinearRegression().fit(x, 3 * x[:, 0] + 7)

    @modal.method()
    def predict(self, values: list[float]) -> list[float]:
        return [float(y) for y in self.model.predict([[value] for value in values])]


@app.function()
@modal.fastapi_endpoint(method="POST")
def predict(body: dict) -> dict:
    return {"predictions": Regression().predict.remote(body["values"])}
