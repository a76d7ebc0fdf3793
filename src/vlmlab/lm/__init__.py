"""Language models: any transformers causal LM, by local folder or hub id, under a mask policy of ours."""
