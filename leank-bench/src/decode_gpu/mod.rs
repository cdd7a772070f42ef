//! Whole decode steps on a CUDA device: [`speed`] times them at the shape of Llama-3.1-8B with random
//! weights, [`tokens`] compares the tokens of a real model with those of the CPU.

mod fit;
pub mod speed;
pub mod tokens;

use std::{fmt, path::PathBuf, str::FromStr};

use leank_core::{
    CacheConfig, Dtype, ModelShape, Windows,
    files::{ReadOptions, read_mask},
};

pub use fit::MemorySize;

use crate::{
    Error, Result,
    setting::{DeviceFormats, Published, with_format},
};

/// The mask of the lean cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MaskChoice {
    /// LeanK's published kept counts, spread over the heads of any model.
    Published(Published),
    /// A mask's file.
    File(PathBuf),
}

impl FromStr for MaskChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let published = Published::ALL.into_iter().find(|published| published.to_string() == text);
        Ok(published.map_or_else(|| Self::File(text.into()), Self::Published))
    }
}

impl fmt::Display for MaskChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Published(published) => published.fmt(f),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl MaskChoice {
    /// A lean cache with this mask. Without `windows` and `formats`, those that the mask was made for.
    ///
    /// # Errors
    /// Those of [`read_mask`]; [`leank_core::Error::Mismatch`] for a mask of another shape.
    pub fn config(
        &self,
        shape: ModelShape,
        windows: Option<Windows>,
        formats: Option<DeviceFormats>,
        dtype: Dtype,
    ) -> Result<CacheConfig> {
        let config = match self {
            Self::Published(published) => published.config(shape)?,
            Self::File(path) => CacheConfig::new(shape, read_mask(path, &ReadOptions::default())?)?,
        };
        let windows = windows.unwrap_or(config.windows);
        let config = CacheConfig { windows, dtype, ..config };
        Ok(match formats {
            Some(formats) => with_format(config, formats.format(dtype)),
            None => config,
        })
    }
}

/// A cache that prunes nothing.
fn dense(shape: ModelShape, dtype: Dtype) -> Result<CacheConfig> {
    Ok(CacheConfig { dtype, ..CacheConfig::dense(shape)? })
}

/// The storage types that the CUDA backend has.
fn check_dtype(dtype: Dtype) -> Result<()> {
    if dtype == Dtype::F32 {
        return Err(Error::option("storage type", "f16 or bf16", dtype));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_published_or_files() {
        for text in ["llama", "qwen", "a/mask.safetensors"] {
            assert_eq!(text.parse::<MaskChoice>().unwrap().to_string(), text);
        }
        let shape = ModelShape::new(2, 4, 2, 64).unwrap();
        let llama = MaskChoice::Published(Published::Llama);
        let config = llama.config(shape, None, None, Dtype::Bf16).unwrap();
        assert_eq!((config.windows, config.dtype), (Published::WINDOWS, Dtype::Bf16));
        let windows = Windows { sink: 3, recent: 5 };
        assert_eq!(llama.config(shape, Some(windows), None, Dtype::F16).unwrap().windows, windows);
        let missing = MaskChoice::File("no/such/mask.safetensors".into());
        let error = missing.config(shape, None, None, Dtype::F16).unwrap_err().to_string();
        assert!(error.contains("no/such/mask.safetensors"), "{error}");
    }
}
