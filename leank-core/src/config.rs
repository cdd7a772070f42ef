//! What a cache is made for: [`CacheConfig`].

use crate::{
    Dtype, Error, HeadFormat, KvHead, Layer, LeanFormat, ModelMask, ModelShape, Result, Tensor,
    Windows,
};

/// Everything that decides what a cache stores and what attention over it means.
///
/// ```
/// use leank_core::{CacheConfig, Dtype, ModelMask, ModelShape, Windows};
///
/// let shape = ModelShape::new(30, 9, 3, 64)?;
/// let mut config = CacheConfig::new(shape, ModelMask::dense(&shape))?;
/// config.windows = Windows { sink: 32, recent: 128 };
/// config.dtype = Dtype::Bf16;
/// # Ok::<(), leank_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Attention shape of the model.
    pub shape: ModelShape,
    /// Kept channels of every head.
    pub mask: ModelMask,
    /// Tokens that are kept whole.
    pub windows: Windows,
    /// Tokens per block.
    pub block: usize,
    /// Element type of full blocks, and of lean ones where neither `formats` nor the mask says
    /// something else.
    pub dtype: Dtype,
    /// Formats of the heads in lean blocks, layer-major; `None`: what the mask asks for beside full
    /// blocks of `dtype`, which is plain elements of `dtype` where it asks for nothing.
    pub formats: Option<Vec<HeadFormat>>,
    /// Factor on q·k; `None`: 1/√head_dim with the full `head_dim`, whatever is kept.
    pub scale: Option<f32>,
    /// Logits become `cap · tanh(logit / cap)` (Gemma 2); `None`: as they are.
    pub soft_cap: Option<f32>,
    /// Most bytes of block storage the cache may take; `None`: no limit.
    pub limit: Option<u64>,
}

/// Recommended tokens per block.
pub const DEFAULT_BLOCK: usize = 64;
/// Largest number of tokens per block.
pub const MAX_BLOCK: usize = 1 << 12;
/// Largest scale and soft-cap: backends multiply them by log₂ e or its inverse.
const MAX_FACTOR: f32 = 1e30;

impl CacheConfig {
    /// A configuration with the mask's windows (or the default ones), blocks of
    /// [`DEFAULT_BLOCK`] tokens, f16 storage and no limit.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the mask's shape is not the model's.
    pub fn new(shape: ModelShape, mask: ModelMask) -> Result<Self> {
        shape.validate()?;
        mask.check_shape(&shape)?;
        let windows = mask.info().windows.unwrap_or_default();
        Ok(Self {
            shape,
            mask,
            windows,
            block: DEFAULT_BLOCK,
            dtype: Dtype::F16,
            formats: None,
            scale: None,
            soft_cap: None,
            limit: None,
        })
    }

    /// A configuration that prunes nothing and never packs: a plain paged cache.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a shape no model has.
    pub fn dense(shape: ModelShape) -> Result<Self> {
        shape.validate()?;
        let config = Self::new(shape, ModelMask::dense(&shape))?;
        Ok(Self { windows: Windows::EVERYTHING, ..config })
    }

    /// Checks every field against the others.
    ///
    /// # Errors
    /// [`Error::Mismatch`] or [`Error::Invalid`] that names the field.
    pub fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        self.mask.check_shape(&self.shape)?;
        if self.block == 0 || self.block > MAX_BLOCK {
            let why = format!("{} tokens per block, not in 1..={MAX_BLOCK}", self.block);
            return Err(Error::invalid("block size", why));
        }
        if let Some(formats) = &self.formats {
            let heads = self.shape.layers * self.shape.kv_heads;
            if formats.len() != heads {
                return Err(Error::mismatch("lean formats, one per head", heads, formats.len()));
            }
        }
        for (what, value) in [("scale", self.scale), ("logit soft-cap", self.soft_cap)] {
            if let Some(value) = value
                && !(value > 0.0 && value <= MAX_FACTOR)
            {
                let why = format!("{value} is not a positive number up to {MAX_FACTOR:e}");
                return Err(Error::invalid(what, why));
            }
        }
        Ok(())
    }

    /// The factor on q·k.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale.unwrap_or_else(|| (1.0 / (self.shape.head_dim as f64).sqrt()) as f32)
    }

    /// The formats of one head in lean blocks.
    #[must_use]
    pub fn format(&self, layer: Layer, head: KvHead) -> HeadFormat {
        match &self.formats {
            Some(formats) => formats[layer.0 * self.shape.kv_heads + head.0],
            None => self.mask.precision(layer, head).format(self.dtype),
        }
    }

    /// Checks that every format of live heads is among those that a backend has; `backend` names it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] that names the first other one, its head, and those that there are.
    pub fn check_formats(&self, backend: &str, has: &[LeanFormat]) -> Result<()> {
        for (layer, head) in self.shape.all_kv_heads() {
            if self.mask.head(layer, head).is_dead() {
                continue;
            }
            for tensor in [Tensor::K, Tensor::V] {
                let format = self.format(layer, head).of(tensor);
                if !has.contains(&format) {
                    let has: Vec<_> = has.iter().map(ToString::to_string).collect();
                    let why = format!(
                        "{format} ({tensor:?} of layer {layer}, KV head {head}): {backend} stores lean \
                         blocks beside full ones of {} as {} only",
                        self.dtype,
                        has.join(", ")
                    );
                    return Err(Error::Unavailable { what: "lean format", why });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChannelMask, HeadPrecision};

    fn masked(heads: Vec<ChannelMask>, precisions: Vec<HeadPrecision>) -> CacheConfig {
        let shape = ModelShape::new(1, 2, 2, 8).unwrap();
        let mask = ModelMask::new(1, 2, 8, heads).unwrap().with_precisions(precisions).unwrap();
        CacheConfig::new(shape, mask).unwrap()
    }

    #[test]
    fn a_mask_says_the_formats_and_a_configuration_others() {
        let precisions = ["k8v4", "k16v16"].map(|name| name.parse().unwrap());
        let config = masked(vec![ChannelMask::all(8); 2], precisions.into());
        let format = |config: &CacheConfig, head| config.format(Layer(0), KvHead(head));
        let coded = HeadFormat { k: LeanFormat::Int8, v: LeanFormat::Int4 };
        assert_eq!(format(&config, 0), coded);
        assert_eq!(format(&config, 1), HeadFormat::plain(Dtype::F16));
        let formats = Some(vec![HeadFormat::plain(Dtype::F32), coded]);
        let config = CacheConfig { formats, ..config };
        assert_eq!(format(&config, 0), HeadFormat::plain(Dtype::F32));
        assert_eq!(format(&config, 1), coded);
    }

    #[test]
    fn formats_that_a_backend_lacks_are_named() {
        let has = [LeanFormat::Plain(Dtype::F16), LeanFormat::Int8];
        let precisions: Vec<HeadPrecision> =
            ["k8v8", "k8v4"].map(|name| name.parse().unwrap()).into();
        let config = masked(vec![ChannelMask::all(8); 2], precisions.clone());
        let error = config.check_formats("a backend", &has).unwrap_err();
        assert!(matches!(error, Error::Unavailable { what: "lean format", .. }), "{error:?}");
        let message = error.to_string();
        for part in ["int4", "V of layer 0, KV head 1", "a backend", "f16, int8"] {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
        // Nothing of a dead head is stored.
        let heads = vec![ChannelMask::all(8), ChannelMask::none(8)];
        masked(heads, precisions).check_formats("a backend", &has).unwrap();
    }

    #[test]
    fn every_field_is_checked() {
        let shape = ModelShape::new(2, 4, 2, 64).unwrap();
        let dense = CacheConfig::dense(shape).unwrap();
        assert_eq!((dense.windows, dense.scale()), (Windows::EVERYTHING, 0.125));
        assert_eq!(CacheConfig { scale: Some(3.0), ..dense.clone() }.scale(), 3.0);
        for good in [
            dense.clone(),
            CacheConfig { block: 1, ..dense.clone() },
            CacheConfig { block: MAX_BLOCK, ..dense.clone() },
            CacheConfig { formats: Some(vec![HeadFormat::plain(Dtype::F16); 4]), ..dense.clone() },
            CacheConfig { scale: Some(f32::MIN_POSITIVE), soft_cap: Some(50.0), ..dense.clone() },
            CacheConfig { scale: Some(MAX_FACTOR), soft_cap: Some(MAX_FACTOR), ..dense.clone() },
        ] {
            good.validate().unwrap();
        }
        let bad = |config: CacheConfig, names: &str| {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(names), "{names} is not in {error}");
        };
        bad(CacheConfig { block: 0, ..dense.clone() }, "block size");
        bad(CacheConfig { block: MAX_BLOCK + 1, ..dense.clone() }, "block size");
        for heads in [2, 3, 5, 8] {
            let formats = Some(vec![HeadFormat::plain(Dtype::F16); heads]);
            bad(CacheConfig { formats, ..dense.clone() }, "lean formats");
        }
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY, 1.01e30, 3e38].map(Some) {
            bad(CacheConfig { scale: value, ..dense.clone() }, "scale");
            bad(CacheConfig { soft_cap: value, ..dense.clone() }, "soft-cap");
        }
        bad(CacheConfig { shape: ModelShape { layers: 3, ..shape }, ..dense.clone() }, "shape");
        bad(CacheConfig { shape: ModelShape { query_heads: 3, ..shape }, ..dense }, "multiple");
    }
}
