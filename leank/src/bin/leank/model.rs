//! The model argument that several commands share.

use std::path::PathBuf;

use anyhow::Context as _;
use leank::candle::{LoadOptions, Model, Precision};

/// Which model.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model: a .gguf file, or a folder with config.json, tokenizer.json and safetensors.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
}

impl Args {
    /// Loads it with f32 weights.
    pub(crate) fn load(&self) -> anyhow::Result<Model> {
        self.load_as(Precision::F32)
    }

    /// Loads it.
    pub(crate) fn load_as(&self, precision: Precision) -> anyhow::Result<Model> {
        Model::load(&self.model, LoadOptions::with_precision(precision))
            .context("loading the model")
    }
}
