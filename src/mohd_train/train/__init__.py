"""Training on Composer: ``run.train(config)``; ``build.build(config)`` for the Trainer alone."""
