use std::path::PathBuf;

use serde_json::{Map, Value, json};

/// What a coordination server is to have besides what each has.
#[derive(Clone, Default)]
pub struct Site {
    /// The certificate to serve HTTPS with, and its key.
    pub https: Option<(PathBuf, PathBuf)>,
    /// Relays besides its own: regions of a DERP map.
    pub regions: Vec<Value>,
    /// Nodes have no keys, and people let them in.
    pub by_login: bool,
}

impl Site {
    pub(crate) fn scheme(&self) -> &'static str {
        if self.https.is_some() {
            "https"
        } else {
            "http"
        }
    }

    /// The further relays as `tailcfg.DERPMap`.
    pub(crate) fn derp_map(&self) -> Value {
        let regions = self
            .regions
            .iter()
            .map(|region| (region["RegionID"].to_string(), region.clone()));
        json!({ "Regions": regions.collect::<Map<_, _>>() })
    }
}
