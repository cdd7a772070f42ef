//! What the libraries say, in the words of the command line.
//!
//! A library names its options; whoever runs the command needs the name of the flag.

use std::error::Error;

use leank::{candle, train};

/// The flag that sets an option of a library.
fn flag(option: &str) -> Option<&'static str> {
    Some(match option {
        "alignment" => "--align",
        "batch" => "--batch",
        "block size" => "--block",
        "bytes" => "--bytes",
        "draws" => "--probes",
        "exempt" => "--exempt",
        "formats" => "--formats",
        "items" => "--items",
        "k-ratio" => "--k-ratio",
        "layers" => "--layers",
        "method" => "--method",
        "positions" => "--positions",
        "prefix" => "--prefix",
        "probe" => "--probe",
        "records" => "--records",
        "retrieval" => "--retrieval",
        "sequences" => "--sequences",
        "step" => "--step",
        "texts" => "--text",
        _ => return None,
    })
}

/// An error without its causes, flags in the place of options.
pub(crate) fn message(error: &(dyn Error + 'static)) -> String {
    let known = error
        .downcast_ref()
        .and_then(of_candle)
        .or_else(|| error.downcast_ref().and_then(of_train))
        .or_else(|| error.downcast_ref().and_then(of_core));
    known.unwrap_or_else(|| error.to_string())
}

fn of_candle(error: &candle::Error) -> Option<String> {
    match error {
        candle::Error::Option { option, why } => named(option, why),
        candle::Error::Train(error) => of_train(error),
        candle::Error::Core(error) => of_core(error),
        _ => None,
    }
}

fn of_train(error: &train::Error) -> Option<String> {
    match error {
        train::Error::Options { option, why } => named(option, why),
        train::Error::Core(error) => of_core(error),
        _ => None,
    }
}

fn of_core(error: &leank::Error) -> Option<String> {
    match error {
        // Values that the cache's element type cannot hold.
        leank::Error::Invalid { what: "K" | "V", .. } => {
            Some(format!("{error} (--dtype sets the type)"))
        }
        leank::Error::Invalid { what, why } => named(what, why),
        _ => None,
    }
}

fn named(option: &str, why: &str) -> Option<String> {
    flag(option).map(|flag| format!("{flag}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_flags_however_deep_they_lie() {
        let option = || train::Error::Options { option: "alignment", why: "5".into() };
        assert_eq!(message(&option()), "--align: 5");
        assert_eq!(message(&candle::Error::from(option())), "--align: 5");
        let block = || leank::Error::invalid("block size", "0");
        assert_eq!(message(&block()), "--block: 0");
        assert_eq!(message(&candle::Error::from(block())), "--block: 0");
        assert_eq!(message(&train::Error::from(block())), "--block: 0");
        let draws = candle::Error::Option { option: "draws", why: "0".into() };
        assert_eq!(message(&draws), "--probes: 0");
        let infinite = candle::Error::from(leank::Error::invalid("K", "not finite in f16"));
        assert!(message(&infinite).contains("--dtype"));
        // What is no option stays as it is.
        let other = leank::Error::invalid("mask file name", "x");
        assert_eq!(message(&other), other.to_string());
    }
}
