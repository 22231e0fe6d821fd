"""Read and write checkpoints, ours and the published ones, with the classes of the original LanguageBind package."""
