//! The precisions that a budget may be spent on.

use std::{fmt, str::FromStr};

use leank_core::{HeadPrecision, Precision};

use crate::{Error, Result};

/// Precisions of lean blocks that an allocation chooses among, for each head K and V apart. Written
/// `k16,k8,v16,v8,v4`.
///
/// ```
/// use leank_train::allocate::Offer;
///
/// let offer: Offer = "k8,k16,v4".parse()?;
/// assert_eq!(offer.to_string(), "k16,k8,v4");
/// assert_eq!(offer.precisions().count(), 2);
/// assert_eq!(Offer::default().to_string(), "k16,v16");
/// # Ok::<(), leank_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Most bits first, each once, at least one.
    k: Vec<Precision>,
    v: Vec<Precision>,
}

impl Default for Offer {
    /// 16 bits only.
    fn default() -> Self {
        Self { k: vec![Precision::Sixteen], v: vec![Precision::Sixteen] }
    }
}

impl Offer {
    /// Every combination of K and V.
    pub fn precisions(&self) -> impl Iterator<Item = HeadPrecision> {
        self.k.iter().flat_map(|&k| self.v.iter().map(move |&v| HeadPrecision { k, v }))
    }

    /// Whether it offers anything but 16 bits.
    #[must_use]
    pub fn is_coded(&self) -> bool {
        *self != Self::default()
    }
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |name: char, all: &[Precision]| -> Vec<String> {
            all.iter().map(|precision| format!("{name}{}", precision.bits())).collect()
        };
        f.write_str(&[named('k', &self.k), named('v', &self.v)].concat().join(","))
    }
}

impl FromStr for Offer {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |what: String| {
            let mend = "write K and V with 16, 8 or 4 each, as in k16,k8,k4,v16,v8,v4";
            Error::options("formats", format!("{what}; {mend}"))
        };
        let mut offer = Self { k: Vec::new(), v: Vec::new() };
        for name in text.split(',') {
            let parse = || {
                let (side, bits) = name.split_at_checked(1)?;
                let precision =
                    Precision::ALL.into_iter().find(|p| p.bits().to_string() == bits)?;
                Some((side, precision))
            };
            match parse() {
                Some(("k", precision)) => offer.k.push(precision),
                Some(("v", precision)) => offer.v.push(precision),
                _ => return Err(refuse(format!("{name:?} is no format"))),
            }
        }
        for (name, all) in [("K", &mut offer.k), ("V", &mut offer.v)] {
            if all.is_empty() {
                return Err(refuse(format!("{text:?} offers none for {name}")));
            }
            all.sort_by(|a, b| b.cmp(a));
            all.dedup();
        }
        Ok(offer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_are_read_and_others_refused() {
        let offer: Offer = "v4,k8,v16,k8,k4".parse().unwrap();
        assert_eq!(offer.to_string(), "k8,k4,v16,v4");
        assert_eq!(offer.to_string().parse::<Offer>().unwrap(), offer);
        let all: Vec<_> = offer.precisions().map(|own| own.to_string()).collect();
        assert_eq!(all, ["k8v16", "k8v4", "k4v16", "k4v4"]);
        assert!(offer.is_coded() && !"v16,k16".parse::<Offer>().unwrap().is_coded());
        for (wrong, why) in [
            ("", "is no format"),
            ("k8", "none for V"),
            ("v8,v4", "none for K"),
            ("k8v8", "\"k8v8\" is no format"),
            ("k2,v8", "\"k2\""),
            ("k8, v8", "\" v8\""),
            ("k08,v8", "\"k08\""),
            ("é8,v8", "is no format"),
        ] {
            let message = wrong.parse::<Offer>().unwrap_err().to_string();
            assert!(message.contains(why) && message.contains("k16,k8,k4"), "{wrong}: {message}");
        }
    }
}
