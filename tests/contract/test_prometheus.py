"""Our steps among the metrics that vLLM's own server offers to Prometheus."""

from __future__ import annotations

from verl_ascend_rollout.engine.metrics import PROMETHEUS_NAME, StepMetrics


def test_vllms_metrics_endpoint_has_the_rollouts_steps() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    attach_router(app)
    StepMetrics(5, prometheus=True).add("wake_up", 0.75)
    StepMetrics(6, prometheus=False).add("wake_up", 0.75)
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    assert f'{PROMETHEUS_NAME}_sum{{replica="5",step="wake_up"}} 0.75' in answer.text
    assert f'{PROMETHEUS_NAME}_count{{replica="5",step="wake_up"}} 1.0' in answer.text
    assert 'replica="6"' not in answer.text
