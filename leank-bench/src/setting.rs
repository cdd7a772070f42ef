//! What is measured: head shapes, the mask of the lean cache, random data.

use std::{fmt, str::FromStr};

use leank_core::{
    CacheConfig, ChannelMask, Dtype, HeadFormat, HeadPrecision, LeanFormat, ModelMask, ModelShape,
    Result as CoreResult, Windows,
};
use leank_train::rng::Rng;
use serde::Serialize;

use crate::{Error, Result};

/// Formats of lean blocks on a device: those that a mask can ask for, as `k8v4`, or `fp8` for K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFormats {
    /// As masks ask for them.
    Masks(HeadPrecision),
    /// [`LeanFormat::Fp8`].
    Fp8,
}

impl DeviceFormats {
    /// The formats beside full blocks of this type.
    #[must_use]
    pub fn format(self, full: Dtype) -> HeadFormat {
        match self {
            Self::Masks(precision) => precision.format(full),
            Self::Fp8 => HeadFormat { k: LeanFormat::Fp8, v: LeanFormat::Fp8 },
        }
    }
}

impl Default for DeviceFormats {
    fn default() -> Self {
        Self::Masks(HeadPrecision::default())
    }
}

impl FromStr for DeviceFormats {
    type Err = leank_core::Error;

    fn from_str(text: &str) -> CoreResult<Self> {
        if text == "fp8" { Ok(Self::Fp8) } else { text.parse().map(Self::Masks) }
    }
}

impl fmt::Display for DeviceFormats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Masks(precision) => precision.fmt(f),
            Self::Fp8 => f.write_str("fp8"),
        }
    }
}

/// The cache with lean blocks of all heads in one format.
pub(crate) fn with_format(config: CacheConfig, format: HeadFormat) -> CacheConfig {
    let heads = config.shape.layers * config.shape.kv_heads;
    CacheConfig { formats: Some(vec![format; heads]), ..config }
}

/// The attention heads of one layer.
///
/// Parses from a name (`A`, `B`, `smollm2`, any case) or from
/// `QUERY_HEADS/KV_HEADSxHEAD_DIM`:
///
/// ```
/// use leank_bench::setting::HeadShape;
/// assert_eq!("A".parse::<HeadShape>()?, "32/8x128".parse()?);
/// # Ok::<(), leank_bench::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HeadShape {
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Llama 3 8B and kin.
    pub const A: Self = Self { query_heads: 32, kv_heads: 8, head_dim: 128 };
    /// Qwen2.5 0.5B.
    pub const B: Self = Self { query_heads: 14, kv_heads: 2, head_dim: 64 };
    /// SmolLM2 135M.
    pub const SMOLLM2: Self = Self { query_heads: 9, kv_heads: 3, head_dim: 64 };

    const NAMED: [(&'static str, Self); 3] =
        [("A", Self::A), ("B", Self::B), ("smollm2", Self::SMOLLM2)];

    /// A model of `layers` such layers.
    ///
    /// # Errors
    /// As [`ModelShape::new`].
    pub fn model(self, layers: usize) -> CoreResult<ModelShape> {
        ModelShape::new(layers, self.query_heads, self.kv_heads, self.head_dim)
    }
}

impl FromStr for HeadShape {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some((_, shape)) =
            Self::NAMED.iter().find(|(name, _)| name.eq_ignore_ascii_case(text))
        {
            return Ok(*shape);
        }
        let numbers = || {
            let (heads, head_dim) = text.split_once('x')?;
            let (query_heads, kv_heads) = heads.split_once('/')?;
            Some(Self {
                query_heads: query_heads.parse().ok()?,
                kv_heads: kv_heads.parse().ok()?,
                head_dim: head_dim.parse().ok()?,
            })
        };
        let shape = numbers().ok_or_else(|| {
            let expected = "A, B, smollm2 or QUERY_HEADS/KV_HEADSxHEAD_DIM such as 32/8x128";
            Error::option("head shape", expected, format!("`{text}`"))
        })?;
        shape.model(1)?;
        Ok(shape)
    }
}

impl fmt::Display for HeadShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = Self::NAMED.iter().find(|(_, shape)| shape == self) {
            return f.write_str(name);
        }
        write!(f, "{}/{}x{}", self.query_heads, self.kv_heads, self.head_dim)
    }
}

/// The kept counts that the heads of the lean cache take in turn: a dead head, a quarter, a half,
/// and the most of the head (0/16/32/64 of 64, 0/32/64/96 of 128).
#[must_use]
pub fn kept_counts(head_dim: usize) -> [usize; 4] {
    let most = if head_dim <= 64 { head_dim } else { head_dim * 3 / 4 };
    [0, head_dim / 4, head_dim / 2, most]
}

/// Layers after which the kept counts of [`mixed_mask`] repeat.
#[must_use]
pub fn mask_period(kv_heads: usize) -> usize {
    let kinds = kept_counts(1).len();
    (1..=kinds).find(|layers| (layers * kv_heads).is_multiple_of(kinds)).unwrap_or(kinds)
}

/// A mask whose heads take [`kept_counts`] in turn, the kept channels spread over the head.
///
/// # Errors
/// As [`ModelMask::new`].
pub fn mixed_mask(shape: &ModelShape) -> CoreResult<ModelMask> {
    let counts = kept_counts(shape.head_dim);
    let heads = (0..shape.layers * shape.kv_heads)
        .map(|head| spread(shape.head_dim, counts[head % counts.len()]));
    ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads.collect::<CoreResult<_>>()?)
}

/// Kept counts of LeanK's published masks, in units of 32 of 128 channels: a word per layer, a digit
/// per KV head. Llama-3.1-8B-Instruct keeps 31.25 % of K and 81.6 % of V.
const LLAMA: &str = "11110101 21211111 01021311 11111111 11113101 12301210 11001112 11000220 \
                     20300111 21120122 31021012 02020201 20110100 23222222 12123212 21211113 \
                     31212322 11211232 12102211 21120201 30121221 20101101 21030012 12021211 \
                     11013230 13031110 21131102 03110312 11122111 11200211 21231232 11111211";

/// Qwen2.5-7B-Instruct: 29.0 % of K and 68.75 % of V.
const QWEN: &str = "0000 1000 1001 0010 0200 1121 0110 1010 0002 1211 1001 1102 1221 0110 \
                    3222 1021 3221 0222 0221 1032 0212 2122 3213 0330 1103 1322 2123 2222";

/// A model of which LeanK published the mask, whose heads a layer takes in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Published {
    /// Llama-3.1-8B: 32 layers, 32 query heads on 8 KV heads of 128 channels.
    Llama,
    /// Qwen2.5-7B: 28 layers, 28 query heads on 4 KV heads of 128 channels.
    Qwen,
}

impl Published {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Llama, Self::Qwen];

    /// The windows that LeanK uses with them.
    pub const WINDOWS: Windows = Windows { sink: 128, recent: 768 };

    fn quarters(self) -> Vec<usize> {
        let digits = match self {
            Self::Llama => LLAMA,
            Self::Qwen => QWEN,
        };
        digits.chars().filter_map(|digit| digit.to_digit(10)).map(|digit| digit as usize).collect()
    }

    /// Layers of `kv_heads` heads until every head of the mask was taken once.
    #[must_use]
    pub fn layers(self, kv_heads: usize) -> usize {
        self.quarters().len().div_ceil(kv_heads)
    }

    /// A mask whose heads keep the published shares of their channels, spread over the head. With
    /// fewer layers than [`Published::layers`], these are taken at equal distances.
    ///
    /// # Errors
    /// As [`ModelMask::new`].
    pub fn mask(self, shape: &ModelShape) -> CoreResult<ModelMask> {
        let quarters = self.quarters();
        let all = self.layers(shape.kv_heads);
        let heads = (0..shape.layers * shape.kv_heads).map(|head| {
            let (layer, head) = (head / shape.kv_heads, head % shape.kv_heads);
            let layer = if shape.layers < all { layer * all / shape.layers } else { layer };
            let kept = quarters[(layer * shape.kv_heads + head) % quarters.len()];
            spread(shape.head_dim, shape.head_dim * kept / 4)
        });
        let heads = heads.collect::<CoreResult<_>>()?;
        ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads)
    }

    /// The model's own shape, and its mask.
    ///
    /// # Errors
    /// As [`ModelMask::new`].
    pub fn model(self) -> CoreResult<(ModelShape, ModelMask)> {
        let (layers, query_heads, kv_heads) = match self {
            Self::Llama => (32, 32, 8),
            Self::Qwen => (28, 28, 4),
        };
        let shape = ModelShape::new(layers, query_heads, kv_heads, 128)?;
        Ok((shape, self.mask(&shape)?))
    }

    /// A cache with [`Published::mask`] and [`Published::WINDOWS`].
    ///
    /// # Errors
    /// As [`CacheConfig::new`].
    pub fn config(self, shape: ModelShape) -> CoreResult<CacheConfig> {
        let config = CacheConfig::new(shape, self.mask(&shape)?)?;
        Ok(CacheConfig { windows: Self::WINDOWS, ..config })
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Llama => "llama",
            Self::Qwen => "qwen",
        })
    }
}

/// `kept` channels at equal distances.
fn spread(head_dim: usize, kept: usize) -> CoreResult<ChannelMask> {
    // Both are at most MAX_HEAD_DIM (2^12).
    ChannelMask::new(head_dim, (0..kept).map(|i| (i * head_dim / kept) as u16).collect())
}

/// Fills a slice with uniform numbers in ±√3: mean 0 and variance 1, never 0. Zero pages are shared
/// by the system and read from cache, and powers of two flatter some arithmetic.
pub fn fill(random: &mut Rng, out: &mut [f32]) {
    for x in out {
        let unit = ((random.next_u64() >> 41) as f32 + 0.5) / (1u32 << 23) as f32;
        *x = (unit - 0.5) * 12f32.sqrt();
    }
}

#[cfg(test)]
mod tests {
    use leank_core::Layer;

    use super::*;

    #[test]
    fn shapes_parse_and_print() {
        for (text, shape) in [
            ("A", HeadShape::A),
            ("b", HeadShape::B),
            ("SmolLM2", HeadShape::SMOLLM2),
            ("14/2x64", HeadShape::B),
            ("6/6x80", HeadShape { query_heads: 6, kv_heads: 6, head_dim: 80 }),
        ] {
            let parsed: HeadShape = text.parse().unwrap();
            assert_eq!(parsed, shape, "{text}");
            assert_eq!(parsed.to_string().parse::<HeadShape>().unwrap(), shape, "{text}");
        }
        for text in ["", "C", "32x128", "32/8", "9/2x64", "0/0x64", "4/4x0", "-1/1x64", "2/1x2x3"] {
            assert!(text.parse::<HeadShape>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_mask_repeats_after_its_period() {
        for (kv_heads, period) in [(1, 4), (2, 2), (3, 4), (4, 1), (6, 2), (8, 1)] {
            assert_eq!(mask_period(kv_heads), period, "{kv_heads} KV heads");
            let shape = ModelShape::new(2 * period, kv_heads, kv_heads, 64).unwrap();
            let mask = mixed_mask(&shape).unwrap();
            for layer in 0..period {
                assert_eq!(mask.layer(Layer(layer)), mask.layer(Layer(layer + period)));
            }
        }
    }

    #[test]
    fn kept_channels_are_as_announced() {
        assert_eq!(kept_counts(64), [0, 16, 32, 64]);
        assert_eq!(kept_counts(128), [0, 32, 64, 96]);
        for head_dim in [1, 2, 3, 64, 96, 128, 256] {
            let mask = mixed_mask(&ModelShape::new(1, 4, 4, head_dim).unwrap()).unwrap();
            let kept: Vec<usize> = mask.heads().iter().map(ChannelMask::kept_count).collect();
            assert_eq!(kept, kept_counts(head_dim), "head_dim {head_dim}");
        }
    }

    #[test]
    fn published_counts_keep_what_was_published() {
        let round = |x: f64| (x * 1e4).round() / 1e4;
        for (published, kv_heads, layers, k, v) in
            [(Published::Llama, 8, 32, 0.3125, 0.8164), (Published::Qwen, 4, 28, 0.2902, 0.6875)]
        {
            assert_eq!(published.layers(kv_heads), layers);
            let shape = ModelShape::new(layers, kv_heads, kv_heads, 128).unwrap();
            let mask = published.mask(&shape).unwrap();
            let kept: usize = mask.heads().iter().map(ChannelMask::kept_count).sum();
            let dead = mask.heads().iter().filter(|head| head.is_dead()).count();
            let heads = (layers * kv_heads) as f64;
            assert_eq!(round(kept as f64 / heads / 128.0), k);
            assert_eq!(round(1.0 - dead as f64 / heads), v);
        }
    }

    #[test]
    fn random_data_has_variance_one_and_no_zeros() {
        let mut data = vec![0.0; 1 << 16];
        fill(&mut Rng::new(7), &mut data);
        assert!(data.iter().all(|x| *x != 0.0 && x.abs() < 1.733));
        let n = data.len() as f64;
        let mean = data.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let square = data.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.02, "{mean} {square}");
    }
}
