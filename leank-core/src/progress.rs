//! How far a step has come, and whether a call may come now: the same for every backend.

use crate::{Error, Layer, Ledger, ModelShape, Result, Step, ViewShape};

/// The layers that were appended to in the step under way, and the checks of [`crate::Cache`]'s calls.
#[derive(Clone, Debug)]
pub struct Progress {
    shape: ModelShape,
    appended: Vec<bool>,
}

impl Progress {
    /// Of a cache before its first step.
    #[must_use]
    pub fn new(shape: ModelShape) -> Self {
        Self { shape, appended: vec![false; shape.layers] }
    }

    /// A step was planned.
    pub fn begin(&mut self) {
        self.appended.fill(false);
    }

    /// A layer that was checked has its K and V.
    ///
    /// # Panics
    /// When the index is out of range.
    pub fn mark(&mut self, layer: Layer) {
        self.appended[layer.0] = true;
    }

    /// Every layer has its K and V.
    pub fn mark_all(&mut self) {
        self.appended.fill(true);
    }

    /// Whether `call` on a layer may come now.
    ///
    /// # Errors
    /// [`Error::Order`] outside a step, [`Error::Mismatch`] for a layer that is not there.
    pub fn check_layer(&self, ledger: &Ledger, call: &'static str, layer: Layer) -> Result<()> {
        check_step(ledger, call)?;
        if layer.0 >= self.shape.layers {
            let expected = format!("below {}", self.shape.layers);
            return Err(Error::mismatch("layer", expected, layer));
        }
        Ok(())
    }

    /// Whether attention of a layer may come now.
    ///
    /// # Errors
    /// As [`Progress::check_layer`]; [`Error::Order`] before the layer's `append`.
    pub fn check_attend(&self, ledger: &Ledger, layer: Layer) -> Result<()> {
        self.check_layer(ledger, "attend", layer)?;
        if !self.appended[layer.0] {
            let when = format!("before append of layer {layer}");
            return Err(Error::Order { call: "attend", when });
        }
        Ok(())
    }

    /// The step, where it may end now.
    ///
    /// # Errors
    /// [`Error::Order`] outside a step, or when a layer was not appended to.
    pub fn check_commit<'a>(&self, ledger: &'a Ledger) -> Result<&'a Step> {
        let step = check_step(ledger, "commit")?;
        if let Some(layer) = self.appended.iter().position(|appended| !appended) {
            let when = format!("before append of layer {layer}");
            return Err(Error::Order { call: "commit", when });
        }
        Ok(step)
    }

    /// Whether a view has the step's tokens, so many heads, and the model's channels.
    ///
    /// # Errors
    /// [`Error::Mismatch`].
    pub fn check_view(
        &self,
        ledger: &Ledger,
        what: &'static str,
        view: ViewShape,
        heads: usize,
    ) -> Result<()> {
        let tokens = ledger.step().map_or(0, |step| step.tokens);
        let head_dim = self.shape.head_dim;
        if (view.tokens, view.heads, view.head_dim) == (tokens, heads, head_dim) {
            return Ok(());
        }
        let expected = format!("[{tokens} tokens, {heads} heads, {head_dim} channels]");
        let found = format!("[{}, {}, {}]", view.tokens, view.heads, view.head_dim);
        Err(Error::mismatch(what, expected, found))
    }
}

/// The step under way; `call` is what was tried.
///
/// # Errors
/// [`Error::Order`] outside a step.
fn check_step<'a>(ledger: &'a Ledger, call: &'static str) -> Result<&'a Step> {
    ledger.step().ok_or_else(|| Error::Order { call, when: "without a plan".into() })
}
