"""Run one or several models, whole or layer by layer, on blocks of tokens, and see the inputs of every weight.

What sees them is up to the caller: AIM sums up |x| per channel, merging by second moments sums up x x^T.

    loaded = load(base)                                        # forward.loading: the whole model
    watch = Watch(loaded, see, products=names, vectors=norms)  # forward.watch: calls `see(use, x)` for every input
    with watch:
        for batch in run_batches(loaded, tokens, tokens.split(2), counts, fails):     # forward.whole
            ...

Layer by layer, for models that are larger than the memory, and for several models in step, each on its own text:

    skeleton = build_skeleton(base, torch.float32)             # forward.skeleton: without weights
    with Watch(skeleton, see, ...) as watch, Layerwise(base, skeleton, device, watch=watch) as layers:
        layers.start(batches)                                  # for each model
        for index in in_step([layers, ...]):                   # forward.layerwise
            ...     # every model's inputs of layer `index`, of all of its text, were seen, and its weights are gone

Between two layers nothing of either is in memory but hidden states. Every weight is read once in a pass (`start` to the last layer).
What comes before the first layer and behind the last (the final norm, the head) is seen when a text reaches it.
"""
