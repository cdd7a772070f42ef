//! Which channels of K are kept: per KV head ([`ChannelMask`]) and for a whole model
//! ([`ModelMask`]).

use std::fmt;

use crate::{
    DEFAULT_BLOCK, Dtype, Error, HeadFormat, HeadPrecision, KvHead, Layer, ModelShape, Result,
    RunRecord, Tensor, Windows, shape::MAX_HEAD_DIM,
};

/// The kept channels of one KV head: a strictly ascending list of indices below `head_dim`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChannelMask {
    head_dim: usize,
    kept: Vec<u16>,
}

impl ChannelMask {
    /// A mask that keeps `kept`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `head_dim` is 0 or too large, when a channel is not below it, or
    /// when the list is not strictly ascending.
    pub fn new(head_dim: usize, kept: Vec<u16>) -> Result<Self> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::invalid(
                "channel mask",
                format!("head_dim is {head_dim}, not in 1..={MAX_HEAD_DIM}"),
            ));
        }
        if let Some(pair) = kept.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(Error::invalid(
                "channel mask",
                format!("kept channels must ascend strictly: {} comes before {}", pair[0], pair[1]),
            ));
        }
        if let Some(&last) = kept.last()
            && usize::from(last) >= head_dim
        {
            return Err(Error::invalid(
                "channel mask",
                format!("channel {last} is not below head_dim {head_dim}"),
            ));
        }
        Ok(Self { head_dim, kept })
    }

    /// A mask from one flag per channel.
    ///
    /// # Errors
    /// As [`ChannelMask::new`].
    pub fn from_flags(flags: &[bool]) -> Result<Self> {
        if flags.len() > MAX_HEAD_DIM {
            return Self::new(flags.len(), Vec::new());
        }
        let kept = flags.iter().enumerate().filter(|(_, keep)| **keep).map(|(c, _)| c as u16);
        Self::new(flags.len(), kept.collect())
    }

    /// Keeps every channel.
    ///
    /// # Panics
    /// When `head_dim` is 0 or above [`MAX_HEAD_DIM`]; a validated [`ModelShape`] never is.
    #[must_use]
    pub fn all(head_dim: usize) -> Self {
        assert!((1..=MAX_HEAD_DIM).contains(&head_dim), "head_dim {head_dim} out of range");
        Self { head_dim, kept: (0..head_dim as u16).collect() }
    }

    /// Keeps no channel: a dead head.
    ///
    /// # Panics
    /// As [`ChannelMask::all`].
    #[must_use]
    pub fn none(head_dim: usize) -> Self {
        assert!((1..=MAX_HEAD_DIM).contains(&head_dim), "head_dim {head_dim} out of range");
        Self { head_dim, kept: Vec::new() }
    }

    /// Kept channels, strictly ascending.
    #[must_use]
    pub fn kept(&self) -> &[u16] {
        &self.kept
    }

    /// How many channels are kept.
    #[must_use]
    pub fn kept_count(&self) -> usize {
        self.kept.len()
    }

    /// Channels of the head before pruning.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Whether no channel is kept; then the head's V is not stored in the middle either.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.kept.is_empty()
    }

    /// Whether every channel is kept.
    #[must_use]
    pub fn keeps_all(&self) -> bool {
        self.kept.len() == self.head_dim
    }

    /// One flag per channel.
    #[must_use]
    pub fn flags(&self) -> Vec<bool> {
        let mut flags = vec![false; self.head_dim];
        for &c in &self.kept {
            flags[usize::from(c)] = true;
        }
        flags
    }
}

/// What identifies a model for its mask: a mask is a property of the trained weights, so using it
/// with others is an error that shapes alone would not catch.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
pub struct Fingerprint {
    /// Architecture name, e.g. `llama` or `qwen2`.
    pub architecture: String,
    /// Attention shape.
    pub shape: ModelShape,
    /// RoPE base (theta).
    pub rope_base: f64,
    /// RoPE scaling in words, where there is one.
    #[cfg_attr(feature = "files", serde(default, skip_serializing_if = "Option::is_none"))]
    pub rope_scaling: Option<String>,
    /// SHA-256, in hexadecimal, of what else tells the model apart (its configuration and a sample
    /// of its weights): see [`crate::files::sha256_hex`].
    pub config_hash: String,
    /// The model's sliding layers, where it has some; `shape` counts the other ones only.
    #[cfg_attr(feature = "files", serde(default, skip_serializing_if = "Option::is_none"))]
    pub sliding: Option<Sliding>,
}

/// Layers of a model that see the last tokens only. Their memory does not grow with the context, so
/// they are neither in a lean cache nor in a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
pub struct Sliding {
    /// How many there are.
    pub layers: usize,
    /// Tokens that a query of theirs sees, itself included.
    pub window: usize,
}

impl std::fmt::Display for Sliding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} tokens", self.layers, self.window)
    }
}

impl Fingerprint {
    /// Checks that a mask with fingerprint `mask` belongs to the model with fingerprint `self`.
    ///
    /// The hash is compared last, so that the message names the most telling difference.
    ///
    /// # Errors
    /// [`Error::OtherModel`] with the first field that differs.
    pub fn check(&self, mask: &Fingerprint, mask_model: Option<&str>) -> Result<()> {
        let field = |field, expected: &dyn ToString, found: &dyn ToString| {
            let (expected, found) = (expected.to_string(), found.to_string());
            if expected == found {
                return Ok(());
            }
            let model = mask_model.unwrap_or("unnamed").to_owned();
            Err(Error::OtherModel { field, expected, found, model })
        };
        let scaling = |f: &Fingerprint| f.rope_scaling.clone().unwrap_or_else(|| "none".into());
        field("the shape", &self.shape, &mask.shape)?;
        field("the architecture", &self.architecture, &mask.architecture)?;
        field("the RoPE base", &self.rope_base, &mask.rope_base)?;
        let sliding = |f: &Fingerprint| f.sliding.map_or("none".into(), |s| s.to_string());
        field("the RoPE scaling", &scaling(self), &scaling(mask))?;
        field("the sliding layers", &sliding(self), &sliding(mask))?;
        field("the configuration hash", &self.config_hash, &mask.config_hash)
    }
}

/// What is needed to use a mask rightly, and how it came about. Everything is optional, since
/// published masks come bare.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "files", serde(default))]
pub struct MaskInfo {
    /// Name of the model, for people.
    pub model_id: Option<String>,
    /// Identity of the model, for [`Fingerprint::check`].
    pub fingerprint: Option<Fingerprint>,
    /// Windows that the mask was learned for.
    pub windows: Option<Windows>,
    /// Kept counts are multiples of this.
    pub alignment: Option<usize>,
    /// How the mask was learned, e.g. `e2`.
    pub method: Option<String>,
    /// Budget it was learned under, in words, e.g. `k-ratio 0.7`.
    pub budget: Option<String>,
    /// The loss that learning predicts: half the summed Fisher loss over heads, in nats of KL.
    pub predicted_kl: Option<f64>,
    /// Seed of the learning run.
    pub seed: Option<u64>,
    /// Layers that are never pruned (e.g. sliding-window layers), ascending.
    pub exempt_layers: Vec<usize>,
    /// Version of leank that wrote the mask.
    pub created_by: Option<String>,
    /// The runs that led to the mask, first one first: usually that of the dump, then that of learning.
    #[cfg_attr(feature = "files", serde(skip_serializing_if = "Vec::is_empty"))]
    pub runs: Vec<RunRecord>,
}

/// The kept channels of every KV head of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelMask {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    heads: Vec<ChannelMask>,
    precisions: Option<Vec<HeadPrecision>>,
    scores: Option<Vec<f32>>,
    info: MaskInfo,
}

/// Totals of a mask over all heads, in shares of the dense model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MaskSummary {
    /// Share of K's channels that is kept in the middle.
    pub kept_k: f64,
    /// Share of V that is kept in the middle: the share of live heads.
    pub kept_v: f64,
    /// Bytes of the middle against dense ones of 16 bits an element: blocks of [`DEFAULT_BLOCK`]
    /// tokens, scales included, no padding.
    pub middle_bytes: f64,
    /// Heads that keep no channel.
    pub dead_heads: usize,
    /// All heads: layers × KV heads.
    pub heads: usize,
}

impl ModelMask {
    /// A mask from its heads, layer-major: head `h` of layer `l` is `heads[l * kv_heads + h]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a shape no model has, [`Error::Mismatch`] when the number of heads
    /// or a head's `head_dim` does not fit it.
    pub fn new(
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        heads: Vec<ChannelMask>,
    ) -> Result<Self> {
        ModelShape::new(layers, kv_heads, kv_heads, head_dim)?;
        if heads.len() != layers * kv_heads {
            let expected = format!("{layers} layers × {kv_heads} KV heads");
            return Err(Error::mismatch("heads of the mask", expected, heads.len()));
        }
        if let Some(odd) = heads.iter().find(|head| head.head_dim() != head_dim) {
            return Err(Error::mismatch("head_dim of a head's mask", head_dim, odd.head_dim()));
        }
        let (precisions, scores, info) = (None, None, MaskInfo::default());
        Ok(Self { layers, kv_heads, head_dim, heads, precisions, scores, info })
    }

    /// A mask that keeps everything: a dense cache.
    ///
    /// # Panics
    /// For a shape that [`ModelShape::validate`] refuses.
    #[must_use]
    pub fn dense(shape: &ModelShape) -> Self {
        if let Err(error) = shape.validate() {
            panic!("{error}");
        }
        let head = ChannelMask::all(shape.head_dim);
        Self {
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            heads: vec![head; shape.layers * shape.kv_heads],
            precisions: None,
            scores: None,
            info: MaskInfo::default(),
        }
    }

    /// A mask from one flag per channel, `[layers, kv_heads, head_dim]` row-major.
    ///
    /// # Errors
    /// As [`ModelMask::new`]; [`Error::Mismatch`] when the number of flags does not fit.
    pub fn from_flags(
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        flags: &[bool],
    ) -> Result<Self> {
        ModelShape::new(layers, kv_heads, kv_heads, head_dim)?;
        if flags.len() != layers * kv_heads * head_dim {
            let expected = format!("{layers} × {kv_heads} × {head_dim}");
            return Err(Error::mismatch("flags of the mask", expected, flags.len()));
        }
        let heads =
            flags.chunks_exact(head_dim).map(ChannelMask::from_flags).collect::<Result<_>>()?;
        Self::new(layers, kv_heads, head_dim, heads)
    }

    /// The same mask with `info` in place of what it carried.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the fingerprint's shape is not the mask's, or an exempt layer is
    /// out of range or pruned; [`Error::Invalid`] when exempt layers do not ascend, or kept counts are
    /// not multiples of the alignment.
    pub fn with_info(mut self, info: MaskInfo) -> Result<Self> {
        if let Some(fingerprint) = &info.fingerprint {
            fingerprint.shape.validate()?;
            self.check_shape(&fingerprint.shape)?;
        }
        if !info.exempt_layers.is_sorted_by(|a, b| a < b) {
            let why = "its exempt layers are not in ascending order, each once";
            return Err(Error::invalid("mask", why));
        }
        for &layer in &info.exempt_layers {
            if layer >= self.layers {
                let expected = format!("below {}", self.layers);
                return Err(Error::mismatch("exempt layer", expected, layer));
            }
            if self.layer(Layer(layer)).iter().any(|head| !head.keeps_all()) {
                return Err(Error::invalid(
                    "mask",
                    format!("layer {layer} is exempt, but some of its channels are pruned"),
                ));
            }
        }
        if let Some(alignment) = info.alignment {
            let odd = |head: &&ChannelMask| {
                !head.keeps_all() && !head.kept_count().is_multiple_of(alignment)
            };
            if alignment == 0 {
                return Err(Error::invalid("mask", "alignment is 0; the least is 1"));
            }
            if let Some(head) = self.heads.iter().find(odd) {
                let kept = head.kept_count();
                return Err(Error::invalid(
                    "mask",
                    format!(
                        "a head keeps {kept} channels, not a multiple of its alignment {alignment}"
                    ),
                ));
            }
        }
        self.info = info;
        Ok(self)
    }

    /// The same mask with importance scores, `[layers, kv_heads, head_dim]` row-major.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when their number does not fit, [`Error::Invalid`] when one is not
    /// finite.
    pub fn with_scores(mut self, scores: Vec<f32>) -> Result<Self> {
        if scores.len() != self.channels() {
            return Err(Error::mismatch("scores of the mask", self.channels(), scores.len()));
        }
        if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
            return Err(Error::invalid("mask scores", format!("score {at} is {}", scores[at])));
        }
        self.scores = Some(scores);
        Ok(self)
    }

    /// The same mask with the precision of every head in lean blocks, layer-major like the heads. A
    /// mask of which no head asks for less than [`Precision::Sixteen`](crate::Precision) is one without.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when their number does not fit.
    pub fn with_precisions(mut self, precisions: Vec<HeadPrecision>) -> Result<Self> {
        if precisions.len() != self.heads.len() {
            let expected = format!("{} layers × {} KV heads", self.layers, self.kv_heads);
            return Err(Error::mismatch("precisions of the mask", expected, precisions.len()));
        }
        let all_plain = precisions.iter().all(|&head| head == HeadPrecision::default());
        self.precisions = (!all_plain).then_some(precisions);
        Ok(self)
    }

    /// The same mask with one precision for every head, but for those of exempt layers, which stay
    /// as they are.
    #[must_use]
    pub fn with_precision(mut self, precision: HeadPrecision) -> Self {
        let exempt = |head: usize| self.is_exempt(Layer(head / self.kv_heads));
        let of = |head| if exempt(head) { HeadPrecision::default() } else { precision };
        let all: Vec<_> = (0..self.heads.len()).map(of).collect();
        let all_plain = all.iter().all(|&head| head == HeadPrecision::default());
        self.precisions = (!all_plain).then_some(all);
        self
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// KV heads per layer.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Channels per head before pruning.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// All channels: layers × KV heads × head_dim.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.layers * self.kv_heads * self.head_dim
    }

    /// The mask of one KV head.
    ///
    /// # Panics
    /// When an index is out of range.
    #[must_use]
    pub fn head(&self, layer: Layer, head: KvHead) -> &ChannelMask {
        &self.layer(layer)[head.0]
    }

    /// The masks of the KV heads of one layer.
    ///
    /// # Panics
    /// When the index is out of range.
    #[must_use]
    pub fn layer(&self, layer: Layer) -> &[ChannelMask] {
        &self.heads[layer.0 * self.kv_heads..][..self.kv_heads]
    }

    /// All heads, layer-major.
    #[must_use]
    pub fn heads(&self) -> &[ChannelMask] {
        &self.heads
    }

    /// Precisions in lean blocks, layer-major, where a head asks for less than 16 bits.
    #[must_use]
    pub fn precisions(&self) -> Option<&[HeadPrecision]> {
        self.precisions.as_deref()
    }

    /// The precision of one head in lean blocks.
    ///
    /// # Panics
    /// When an index is out of range.
    #[must_use]
    pub fn precision(&self, layer: Layer, head: KvHead) -> HeadPrecision {
        assert!(head.0 < self.kv_heads, "KV head {head} of {}", self.kv_heads);
        let index = layer.0 * self.kv_heads + head.0;
        self.precisions.as_ref().map_or_else(HeadPrecision::default, |all| all[index])
    }

    /// Importance scores `[layers, kv_heads, head_dim]`, where the mask carries them.
    #[must_use]
    pub fn scores(&self) -> Option<&[f32]> {
        self.scores.as_deref()
    }

    /// What the mask says about itself.
    #[must_use]
    pub fn info(&self) -> &MaskInfo {
        &self.info
    }

    /// Whether a layer is never pruned.
    #[must_use]
    pub fn is_exempt(&self, layer: Layer) -> bool {
        self.info.exempt_layers.contains(&layer.0)
    }

    /// Checks that the mask's shape is the model's.
    ///
    /// # Errors
    /// [`Error::Mismatch`] that names both shapes.
    pub fn check_shape(&self, shape: &ModelShape) -> Result<()> {
        if (self.layers, self.kv_heads, self.head_dim)
            == (shape.layers, shape.kv_heads, shape.head_dim)
        {
            return Ok(());
        }
        Err(Error::mismatch(
            "shape of the mask against that of the model",
            format!("{shape} (the model)"),
            format!("{self} (the mask); learn a mask for this model"),
        ))
    }

    /// Checks that the mask was learned for the model with this fingerprint: by shape always, by
    /// fingerprint where the mask carries one.
    ///
    /// # Errors
    /// [`Error::Mismatch`] or [`Error::OtherModel`].
    pub fn check_model(&self, model: &Fingerprint) -> Result<()> {
        self.check_shape(&model.shape)?;
        match &self.info.fingerprint {
            Some(own) => model.check(own, self.info.model_id.as_deref()),
            None => Ok(()),
        }
    }

    /// Bytes of a head in a lean block of [`DEFAULT_BLOCK`] tokens, 16 bits an element where its
    /// precision does not say less: scales included, no padding.
    pub(crate) fn lean_head_bytes(&self, layer: Layer, head: KvHead) -> usize {
        let HeadFormat { k, v } = self.precision(layer, head).format(Dtype::F16);
        let kept = self.head(layer, head).kept_count();
        let channels = if kept == 0 { 0 } else { self.head_dim };
        k.bytes(Tensor::K, DEFAULT_BLOCK, kept) + v.bytes(Tensor::V, DEFAULT_BLOCK, channels)
    }

    /// Totals over all heads.
    #[must_use]
    pub fn summary(&self) -> MaskSummary {
        let heads = self.heads.len();
        let kept: usize = self.heads.iter().map(ChannelMask::kept_count).sum();
        let dead_heads = self.heads.iter().filter(|head| head.is_dead()).count();
        let kept_k = kept as f64 / self.channels() as f64;
        let kept_v = (heads - dead_heads) as f64 / heads as f64;
        let of_layer = |layer| (0..self.kv_heads).map(move |head| (Layer(layer), KvHead(head)));
        let bytes = (0..self.layers)
            .flat_map(of_layer)
            .map(|(layer, head)| self.lean_head_bytes(layer, head) as f64);
        let dense = 2 * self.channels() * DEFAULT_BLOCK * Dtype::F16.bytes();
        let middle_bytes = bytes.sum::<f64>() / dense as f64;
        MaskSummary { kept_k, kept_v, middle_bytes, dead_heads, heads }
    }
}

impl fmt::Display for ModelMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers, {} KV heads, head_dim {}", self.layers, self.kv_heads, self.head_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_lists_are_validated() {
        assert!(ChannelMask::new(64, vec![0, 1, 63]).is_ok());
        assert!(ChannelMask::new(64, vec![0, 64]).is_err());
        assert!(ChannelMask::new(64, vec![1, 1]).is_err());
        assert!(ChannelMask::new(64, vec![2, 1]).is_err());
        assert!(ChannelMask::new(0, vec![]).is_err());
        let mask = ChannelMask::new(8, vec![1, 6]).unwrap();
        assert_eq!(ChannelMask::from_flags(&mask.flags()).unwrap(), mask);
    }

    #[test]
    fn summary_counts_dead_heads() {
        let heads = vec![
            ChannelMask::none(4),
            ChannelMask::all(4),
            ChannelMask::new(4, vec![1, 2]).unwrap(),
            ChannelMask::all(4),
        ];
        let mask = ModelMask::new(2, 2, 4, heads).unwrap();
        let summary = mask.summary();
        assert_eq!((summary.dead_heads, summary.heads), (1, 4));
        assert_eq!(summary.kept_k, 10.0 / 16.0);
        assert_eq!(summary.kept_v, 0.75);
        assert_eq!(summary.middle_bytes, (0.625 + 0.75) / 2.0);
    }

    #[test]
    fn summary_counts_codes_and_scales() {
        let shape = ModelShape::new(1, 2, 2, 64).unwrap();
        let eight = "k8v4".parse::<HeadPrecision>().unwrap();
        let mask = ModelMask::dense(&shape);
        let mixed = mask.clone().with_precisions(vec![eight, HeadPrecision::default()]).unwrap();
        // Of 64 × 64 elements: K 1 byte and a scale per channel, V half a byte and two per token.
        let coded = (4096 + 64 * 4) + (2048 + 64 * 2 * 4);
        assert_eq!(mixed.summary().middle_bytes, f64::from(coded + 16_384) / 32_768.0);
        assert_eq!(mixed.precision(Layer(0), KvHead(0)), eight);
        assert_eq!(mixed.precision(Layer(0), KvHead(1)), HeadPrecision::default());
        // Nothing asked for is the same as nothing said.
        let plain = mask.clone().with_precisions(vec![HeadPrecision::default(); 2]).unwrap();
        assert_eq!(plain, mask);
        assert!(mask.with_precisions(vec![eight]).is_err());
    }

    #[test]
    fn one_precision_for_all_but_exempt_layers() {
        let eight = "k8v4".parse::<HeadPrecision>().unwrap();
        let shape = ModelShape::new(2, 2, 2, 4).unwrap();
        let mask = ModelMask::dense(&shape);
        let all = mask.clone().with_precision(eight);
        assert_eq!(all.precisions(), Some(&[eight; 4][..]));
        assert_eq!(all.with_precision(HeadPrecision::default()), mask);
        let info = MaskInfo { exempt_layers: vec![0], ..Default::default() };
        let exempt = mask.with_info(info).unwrap().with_precision(eight);
        assert_eq!(exempt.precision(Layer(0), KvHead(1)), HeadPrecision::default());
        assert_eq!(exempt.precision(Layer(1), KvHead(0)), eight);
    }

    #[test]
    fn info_must_fit_the_mask() {
        let mask = ModelMask::new(1, 1, 4, vec![ChannelMask::new(4, vec![0]).unwrap()]).unwrap();
        let with = |info| mask.clone().with_info(info);
        assert!(with(MaskInfo { alignment: Some(2), ..Default::default() }).is_err());
        assert!(with(MaskInfo { exempt_layers: vec![0], ..Default::default() }).is_err());
        assert!(with(MaskInfo { exempt_layers: vec![1], ..Default::default() }).is_err());
        assert!(with(MaskInfo { alignment: Some(1), ..Default::default() }).is_ok());
    }

    #[test]
    fn another_models_mask_is_refused_by_name() {
        let shape = ModelShape::new(1, 1, 1, 4).unwrap();
        let own = Fingerprint {
            architecture: "llama".into(),
            shape,
            rope_base: 1e4,
            rope_scaling: None,
            config_hash: "a".into(),
            sliding: None,
        };
        let other = Fingerprint { rope_base: 1e5, ..own.clone() };
        let mask = ModelMask::dense(&shape)
            .with_info(MaskInfo {
                fingerprint: Some(other),
                model_id: Some("Other".into()),
                ..Default::default()
            })
            .unwrap();
        let message = mask.check_model(&own).unwrap_err().to_string();
        assert!(message.contains("RoPE base") && message.contains("Other"), "{message}");
        assert!(mask.check_shape(&shape).is_ok());
    }

    #[test]
    fn the_longest_head_is_a_head() {
        let most = MAX_HEAD_DIM;
        assert_eq!(ChannelMask::new(most, vec![most as u16 - 1]).unwrap().head_dim(), most);
        assert!(ChannelMask::new(most + 1, vec![]).is_err());
        assert!(ChannelMask::from_flags(&vec![true; most]).unwrap().keeps_all());
        assert!(ChannelMask::from_flags(&vec![true; most + 1]).is_err());
        assert!(ChannelMask::from_flags(&[]).is_err());
        assert_eq!(ChannelMask::all(most), ChannelMask::from_flags(&vec![true; most]).unwrap());
        assert!(!ChannelMask::new(4, vec![0, 1, 2]).unwrap().keeps_all());
    }

    #[test]
    fn heads_flags_and_scores_must_be_as_many_as_the_shape_says() {
        let head = |head_dim| ChannelMask::all(head_dim);
        assert!(ModelMask::new(2, 3, 4, vec![head(4); 6]).is_ok());
        assert!(ModelMask::new(2, 3, 4, vec![head(4); 5]).is_err());
        assert!(ModelMask::new(2, 1, 4, vec![head(4), head(3)]).is_err());
        assert!(ModelMask::new(0, 1, 4, vec![]).is_err());
        let mask = ModelMask::from_flags(2, 3, 4, &[true; 24]).unwrap();
        assert_eq!(mask, ModelMask::dense(&ModelShape::new(2, 3, 3, 4).unwrap()));
        assert_eq!(
            (mask.channels(), mask.to_string().as_str()),
            (24, "2 layers, 3 KV heads, head_dim 4")
        );
        for flags in [9, 20, 23, 25] {
            assert!(ModelMask::from_flags(2, 3, 4, &vec![true; flags]).is_err());
        }
        assert!(ModelMask::from_flags(0, 1, 4, &[]).is_err());
        assert!(mask.clone().with_scores(vec![0.0; 23]).is_err());
        let mut scores = vec![0.0; 24];
        assert_eq!(mask.clone().with_scores(scores.clone()).unwrap().scores(), Some(&scores[..]));
        scores[5] = f32::INFINITY;
        assert!(mask.with_scores(scores).unwrap_err().to_string().contains("score 5"));
    }

    #[test]
    fn what_a_mask_says_must_be_true() {
        let shape = ModelShape::new(2, 2, 2, 4).unwrap();
        let pruned = ChannelMask::new(4, vec![1, 3]).unwrap();
        let heads = vec![pruned.clone(), pruned, ChannelMask::all(4), ChannelMask::all(4)];
        let mask = ModelMask::new(2, 2, 4, heads).unwrap();
        let exempt = |layer| MaskInfo { exempt_layers: vec![layer], ..Default::default() };
        let one = mask.clone().with_info(exempt(1)).unwrap();
        assert!(one.is_exempt(Layer(1)) && !one.is_exempt(Layer(0)));
        for layer in [0, 2] {
            assert!(mask.clone().with_info(exempt(layer)).is_err());
        }
        // All of a head is a multiple of every alignment.
        for (alignment, good) in [(0, false), (1, true), (2, true), (3, false)] {
            let info = MaskInfo { alignment: Some(alignment), ..Default::default() };
            assert_eq!(mask.clone().with_info(info).is_ok(), good, "{alignment}");
        }
        let other = ModelShape { layers: 3, ..shape };
        assert!(mask.check_shape(&other).is_err());
        assert!(mask.check_shape(&ModelShape { query_heads: 8, ..shape }).is_ok());
        let fingerprint = |shape| Fingerprint { shape, ..fingerprint() };
        let info = |shape| MaskInfo { fingerprint: Some(fingerprint(shape)), ..Default::default() };
        assert!(mask.clone().with_info(info(other)).is_err());
        // Without a fingerprint of its own a mask is checked by shape.
        assert!(mask.check_model(&fingerprint(shape)).is_ok());
        assert!(mask.check_model(&fingerprint(other)).is_err());
    }

    fn fingerprint() -> Fingerprint {
        Fingerprint {
            architecture: "gemma3".into(),
            shape: ModelShape::new(1, 2, 1, 4).unwrap(),
            rope_base: 1e6,
            rope_scaling: Some("linear 8".into()),
            config_hash: "a".into(),
            sliding: Some(Sliding { layers: 5, window: 512 }),
        }
    }

    #[test]
    fn every_field_of_a_fingerprint_counts() {
        let own = fingerprint();
        own.check(&own, None).unwrap();
        let sliding = |layers, window| Some(Sliding { layers, window });
        for (other, names) in [
            (
                Fingerprint { architecture: "gemma2".into(), ..own.clone() },
                "the architecture is gemma2",
            ),
            (
                Fingerprint { shape: ModelShape { query_heads: 4, ..own.shape }, ..own.clone() },
                "4 query",
            ),
            (Fingerprint { rope_base: 1e4, ..own.clone() }, "the RoPE base is 10000"),
            (Fingerprint { rope_scaling: None, ..own.clone() }, "the RoPE scaling is none"),
            (Fingerprint { sliding: None, ..own.clone() }, "the sliding layers is none"),
            (Fingerprint { sliding: sliding(4, 512), ..own.clone() }, "4 of 512 tokens"),
            (Fingerprint { sliding: sliding(5, 256), ..own.clone() }, "5 of 256 tokens"),
            (Fingerprint { config_hash: "b".into(), ..own.clone() }, "the configuration hash is b"),
        ] {
            let error = own.check(&other, None).unwrap_err();
            assert!(matches!(error, Error::OtherModel { .. }), "{error:?}");
            let message = error.to_string();
            assert!(message.contains(names) && message.contains("unnamed"), "{message}");
        }
    }
}
