//! What a value may be. Each reader gives the value, or what is wrong with it and what is accepted.

use std::net::IpAddr;

use ipnet::IpNet;
use tailnode_node::ExitNode;
use url::Url;

use super::{dns_label, table};
use crate::secrets::KeySource;

pub(super) fn hostname(value: &str) -> Result<String, String> {
    dns_label(value)
        .ok_or_else(|| format!("{value:?} has no letter or digit to make a DNS name of"))
}

pub(super) fn url(value: &str) -> Result<Url, String> {
    let url: Url = value.parse().map_err(|error| {
        // What stands before an @ may be a password.
        let (_, shown) = value.rsplit_once('@').unwrap_or(("", value));
        format!("{shown:?} is no URL ({error}); it should look like https://headscale.example.com")
    })?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it must not hold a user or a password".into());
    }
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(format!(
            "{value:?} must begin with https:// or http:// and name a host"
        ));
    }
    Ok(url)
}

pub(super) fn auth_key(value: &str) -> Result<KeySource, String> {
    KeySource::parse(value).map_err(str::to_owned)
}

pub(super) fn flag(value: &str) -> Result<bool, String> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(format!("{value:?} must be true or false")),
    }
}

pub(super) fn tags(value: &str) -> Result<Vec<String>, String> {
    let tags = words(value).map(|tag| {
        let name = tag.strip_prefix("tag:").unwrap_or(tag);
        // As Tailscale's tailcfg.CheckTag has it.
        let fine = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if fine {
            Ok(format!("tag:{name}"))
        } else {
            Err(format!(
                "{tag:?} is no tag: a letter, then letters, digits and hyphens; several are \
                 joined by +"
            ))
        }
    });
    tags.collect()
}

pub(super) fn routes(value: &str) -> Result<Vec<IpNet>, String> {
    let routes = words(value).map(|route| {
        match (route.parse::<IpNet>(), route.parse::<IpAddr>()) {
            (Ok(net), _) if net.prefix_len() == 0 => Err(format!(
                "{route} is everything: set advertise-exit-node=true instead"
            )),
            (Ok(net), _) if net.trunc() != net => Err(format!(
                "{route} has bits set beyond its prefix: do you mean {}?",
                net.trunc()
            )),
            (Ok(net), _) => Ok(net),
            (_, Ok(address)) => Err(format!(
                "{route} has no prefix length: for this one address write {}",
                IpNet::from(address)
            )),
            _ => Err(format!(
                "{route:?} is no network: write 10.0.0.0/24 or fd00:1::/64; several are joined by +"
            )),
        }
    });
    routes.collect()
}

/// An address, or a MagicDNS name or the first label of one; nothing for no exit.
pub(super) fn exit_node(value: &str) -> Result<Option<ExitNode>, String> {
    if value.is_empty() {
        return Ok(None);
    }
    if let Ok(address) = value.parse() {
        return Ok(Some(ExitNode::Address(address)));
    }
    let name = value.trim_end_matches('.').to_ascii_lowercase();
    let is_label = |label: &str| dns_label(label).as_deref() == Some(label);
    if name.split('.').all(is_label) {
        Ok(Some(ExitNode::Name(name)))
    } else {
        Err(format!(
            "{value:?} is neither the name of a node nor a tailnet address"
        ))
    }
}

/// Names of options, each but `lock` itself.
pub(super) fn keys(value: &str) -> Result<Vec<&'static str>, String> {
    let keys = words(value).map(|word| match table::find(word) {
        Some(entry) if entry.key == "lock" => Err("a lock cannot be locked".to_owned()),
        Some(entry) => Ok(entry.key),
        None => Err(format!("{word:?} is no option: {}", table::nearest(word))),
    });
    keys.collect()
}

/// The words of a list. Podman splits at commas by itself, so `+` joins them too.
fn words(value: &str) -> impl Iterator<Item = &str> {
    let words = value.split(['+', ',']).map(str::trim);
    words.filter(|word| !word.is_empty())
}
