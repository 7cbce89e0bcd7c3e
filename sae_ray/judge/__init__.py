"""The judge pool: language models behind Ray Serve LLM that say how far a text shows what an explanation says.

`deploy` starts and stops the pool, `server` is what runs in a replica, `client` asks it from anywhere. `vllm` and
`ray.serve.llm` are imported inside replicas and the deploying task only, so that importing this package is cheap.
"""
