//! Names that a JSON object has twice.

use std::{collections::HashSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

/// The first name that a JSON object has twice; `None` also for what is no object. Parsers disagree about
/// which of the two counts, so a safetensors header with one means different things to different programs.
#[must_use]
pub fn name_twice(json: &[u8]) -> Option<String> {
    serde_json::from_slice::<Twice>(json).ok()?.0
}

struct Twice(Option<String>);

impl<'de> Deserialize<'de> for Twice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Names)
    }
}

struct Names;

impl<'de> Visitor<'de> for Names {
    type Value = Twice;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Twice, M::Error> {
        let (mut seen, mut twice) = (HashSet::new(), None);
        while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
            if seen.contains(&name) {
                twice.get_or_insert(name);
            } else {
                seen.insert(name);
            }
        }
        Ok(Twice(twice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_that_is_there_twice() {
        for (json, expected) in [
            ("{}", None),
            (r#"{"a": {"b": 1}, "b": [{"a": 1, "a": 2}]}"#, None),
            (r#"{"a": 1, "b": 2, "\u0062": 3, "a": 4}"#, Some("b")),
            ("[1, 1]", None),
            (r#"{"a": 1, "a": "#, None),
        ] {
            assert_eq!(name_twice(json.as_bytes()).as_deref(), expected, "{json}");
        }
    }
}
