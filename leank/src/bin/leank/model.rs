//! The model argument that several commands share.

use std::path::{Path, PathBuf};

use leank::{
    CacheConfig, ModelMask,
    candle::{LoadOptions, Model, Precision},
};

use crate::output;

/// Which model.
#[derive(clap::Args)]
// Flattened into commands whose own group is called `Args` too.
#[group(skip)]
pub(crate) struct Args {
    /// The model: a .gguf file, or a folder with config.json, tokenizer.json and safetensors.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
}

impl Args {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.model
    }

    /// Loads it with f32 weights.
    pub(crate) fn load(&self) -> anyhow::Result<Model> {
        self.load_as(Precision::F32)
    }

    /// Loads it.
    pub(crate) fn load_as(&self, precision: Precision) -> anyhow::Result<Model> {
        Model::load(&self.model, LoadOptions::with_precision(precision))
            .map_err(|error| output::about(&self.model, error))
    }
}

/// A lean cache for the model, with a mask that must be for it; `path` is the mask's file.
pub(crate) fn lean_config(
    model: &Model,
    path: &Path,
    mask: ModelMask,
) -> anyhow::Result<CacheConfig> {
    let shape = model.config().global_shape()?;
    mask.check_model(model.fingerprint())
        .and_then(|()| CacheConfig::new(shape, mask))
        .map_err(|error| output::about(path, error))
}
