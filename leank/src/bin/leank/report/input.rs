//! What a report is made of, read and checked before anything is drawn.

use std::path::Path;

use leank::{
    CacheConfig, KvHead, Layer, MaskInfo, ModelMask,
    files::sha256_hex,
    train::{
        dump::{Dump, Manifest},
        learn::{Curves, LearnOptions, Method, recorded},
    },
};

use super::{Args, evaluations, evaluations::Evaluation};
use crate::{
    figure::numbers::shown,
    masks::{self, Padding},
    output,
    plan::{self, Plan},
};

/// A mask with the name of its file.
pub(crate) struct Named {
    /// For display: it cannot steer the page.
    pub(crate) name: String,
    pub(crate) mask: ModelMask,
    /// Of the file, in hexadecimal.
    pub(crate) sha256: String,
    pub(crate) plan: Plan,
}

/// What the dump says that a mask was learned from.
pub(crate) struct Learned {
    pub(crate) manifest: Manifest,
    pub(crate) windows: leank::Windows,
    /// `None`: the method has none.
    pub(crate) curves: Option<Curves>,
}

/// Everything that a report shows.
pub(crate) struct Input {
    pub(crate) own: Named,
    pub(crate) other: Option<Named>,
    pub(crate) learned: Option<Learned>,
    pub(crate) evaluations: Vec<Evaluation>,
}

impl Input {
    /// Reads what the arguments name.
    pub(crate) fn read(args: &Args) -> anyhow::Result<Self> {
        let own = Named::read(&args.mask)?;
        let other = args.compare.as_deref().map(Named::read).transpose()?;
        if let Some(other) = &other {
            same_shape(&args.mask, &own.mask, args.compare.as_deref(), &other.mask)?;
        }
        let learned = args.dump.as_deref().map(|dump| Learned::read(dump, args, &own.mask));
        let learned = learned.transpose()?;
        let evaluations = evaluations::read(&args.eval, &own.mask)?;
        Ok(Self { own, other, learned, evaluations })
    }

    /// The evaluation of the mask that the report is about, where there is one.
    pub(crate) fn own_evaluation(&self) -> Option<&Evaluation> {
        self.evaluations.iter().find(|evaluation| evaluation.is_of(&self.own.mask))
    }
}

impl Named {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let mask = masks::read(path)?;
        let bytes = std::fs::read(path).map_err(|error| output::about(path, error))?;
        let config = CacheConfig::new(plan::shape(&mask)?, mask.clone())?;
        let plan = Plan::new(&config, Padding::Cpu)?;
        let name = shown(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy());
        Ok(Self { name, mask, sha256: sha256_hex(&bytes), plan })
    }

    /// What the mask says about itself.
    pub(crate) fn info(&self) -> &MaskInfo {
        self.mask.info()
    }

    /// Bytes of a lean block against those of a dense one, padding included.
    pub(crate) fn middle_bytes(&self) -> f64 {
        let layout = self.plan.planner().layout();
        let dense = layout.dense_token_bytes as f64 * layout.block as f64;
        layout.lean_bytes_all_layers() as f64 / dense
    }

    /// Bytes against those of a dense cache; windows and padding included.
    pub(crate) fn whole_kv_ratio(&self, tokens: usize) -> Option<f64> {
        self.plan.footprint(tokens).ok()?.whole_kv_ratio()
    }
}

fn same_shape(
    own_path: &Path,
    own: &ModelMask,
    other_path: Option<&Path>,
    other: &ModelMask,
) -> anyhow::Result<()> {
    let shape = |mask: &ModelMask| (mask.layers(), mask.kv_heads(), mask.head_dim());
    anyhow::ensure!(
        shape(own) == shape(other),
        "--compare: {} is for {other}, but {} for {own}; compare masks of one model",
        other_path.unwrap_or(Path::new("")).display(),
        own_path.display(),
    );
    Ok(())
}

impl Learned {
    fn read(path: &Path, args: &Args, mask: &ModelMask) -> anyhow::Result<Self> {
        anyhow::ensure!(
            path.is_dir(),
            "--dump: {}: no such folder; a dump is the folder that `leank dump --out` writes",
            path.display()
        );
        let dump = Dump::open(path)?;
        let (manifest, info) = (dump.manifest().clone(), mask.info());
        mask.check_model(&manifest.fingerprint)
            .map_err(|error| of_another_model(path, &args.mask, mask, &manifest, &error))?;
        let windows = info.windows.unwrap_or_default();
        let curves = match method(info) {
            Method::LeanK => None,
            method => {
                Some(curves(&dump, mask, LearnOptions { method, windows, ..Default::default() })?)
            }
        };
        Ok(Self { manifest, windows, curves })
    }

    /// Half the loss of a head as the mask has it, in nats with the Fisher probe: `None` where it was
    /// not measured.
    pub(crate) fn half_loss(&self, mask: &ModelMask, layer: Layer, head: KvHead) -> Option<f64> {
        let curves = self.curves.as_ref()?;
        let at = layer.0 * mask.kv_heads() + head.0;
        let count = mask.head(layer, head).kept_count();
        let precision = mask.precision(layer, head);
        let plain = precision == Default::default();
        let loss = match curves.precisions.get(at) {
            Some(own) if !plain => own.loss(count, precision),
            _ => curves.heads.get(at)?.loss(count),
        };
        Some(loss? / 2.0)
    }

    /// Heads whose kept channels are not those of the dump's order.
    pub(crate) fn foreign_heads(&self, mask: &ModelMask) -> usize {
        let Some(curves) = &self.curves else { return 0 };
        let pairs = curves.heads.iter().zip(mask.heads());
        pairs.filter(|(curve, own)| curve.kept(own.kept_count()) != own.kept()).count()
    }
}

/// The mask is what the report is about: where the two do not fit, it is the dump that is wrong.
fn of_another_model(
    dump: &Path,
    mask_path: &Path,
    mask: &ModelMask,
    manifest: &Manifest,
    error: &leank::Error,
) -> anyhow::Error {
    let (of_dump, of_mask) = match error {
        leank::Error::OtherModel { field, expected, found, .. } => {
            (format!("{field} is {expected}"), found.clone())
        }
        _ => (format!("it has {}", manifest.shape), mask.to_string()),
    };
    anyhow::anyhow!(
        "--dump: {}: is of another model than {}: {of_dump}, not {of_mask}; give the dump that the mask \
         was learned from",
        dump.display(),
        mask_path.display()
    )
}

fn method(info: &MaskInfo) -> Method {
    info.method.as_deref().and_then(|name| name.parse().ok()).unwrap_or_default()
}

/// The recorded curves; the number of channels between measurements is not in the mask, so the usual
/// one is looked for first, then others that divide its alignment.
fn curves(dump: &Dump, mask: &ModelMask, options: LearnOptions) -> anyhow::Result<Curves> {
    let alignment = mask.info().alignment.unwrap_or(mask.head_dim());
    let usual = LearnOptions::default().step;
    let divisors = (1..=mask.head_dim()).rev().filter(|step| alignment.is_multiple_of(*step));
    let fits = |step: &usize| mask.head_dim().is_multiple_of(*step);
    for step in std::iter::once(usual).chain(divisors).filter(fits) {
        // Losses in bits, where the mask needs them and they are there.
        for precisions in [mask.precisions().is_some(), false] {
            let options = LearnOptions { step, precisions, ..options.clone() };
            if let Some(curves) = recorded(dump, &options)? {
                return Ok(curves);
            }
        }
    }
    let LearnOptions { method, windows, .. } = options;
    anyhow::bail!(
        "--dump: {dir}: holds no record of {method} with sink {sink} and recent {recent}; `leank learn \
         {dir} --method {method} --sink {sink} --recent {recent} --align {alignment} --bytes 0.5 --out \
         again.safetensors` makes it, or leave out --dump",
        dir = dump.dir().display(),
        sink = windows.sink,
        recent = windows.recent,
    )
}
