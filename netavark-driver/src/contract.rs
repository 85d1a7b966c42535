//! What Podman and netavark write to a plugin's standard input, and read from its output:
//! <https://github.com/containers/netavark/blob/main/plugin-API.md>.
//!
//! Unknown fields are passed over and `null` means the same as an absent field: the engines add
//! fields in minor releases, and write `null` for whatever is empty.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

/// The version of the interface that netavark 1 and 2 speak.
pub const API_VERSION: &str = "1.0.0";

/// One container's attachment to one network: the input of `setup` and of `teardown`.
///
/// Addresses that Podman asks for are not among the fields. It repeats those of before when it
/// reloads a network; the tailnet gives the address either way.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Attachment {
    pub container_id: String,
    /// In a pod, the pod's.
    #[serde(default, deserialize_with = "null_is_default")]
    pub container_name: String,
    pub network: Network,
    #[serde(default, deserialize_with = "null_is_default")]
    pub network_options: Endpoint,
}

/// The network, as `podman network create` left it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Network {
    pub id: String,
    pub name: String,
    /// The `-o` options.
    #[serde(default, deserialize_with = "null_is_default")]
    pub options: BTreeMap<String, String>,
}

/// What is said of this container on this network: `--network NAME:key=value`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Endpoint {
    #[serde(default, deserialize_with = "null_is_default")]
    pub options: BTreeMap<String, String>,
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The output of `setup`, by netavark's name for it.
#[derive(Debug, Serialize)]
pub struct StatusBlock {
    interfaces: BTreeMap<String, Interface>,
    dns_server_ips: Vec<IpAddr>,
    dns_search_domains: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Interface {
    /// A TUN device has none.
    mac_address: &'static str,
    subnets: Vec<Subnet>,
}

#[derive(Debug, Serialize)]
struct Subnet {
    ipnet: IpNet,
}

impl StatusBlock {
    /// The device has these addresses; the DNS part goes to the container's /etc/resolv.conf.
    pub fn new(
        device: String,
        addresses: Vec<IpNet>,
        dns_server_ips: Vec<IpAddr>,
        dns_search_domains: Vec<String>,
    ) -> StatusBlock {
        let subnets = addresses
            .into_iter()
            .map(|ipnet| Subnet { ipnet })
            .collect();
        let interface = Interface {
            mac_address: "",
            subnets,
        };
        StatusBlock {
            interfaces: BTreeMap::from([(device, interface)]),
            dns_server_ips,
            dns_search_domains,
        }
    }
}

/// A network that is being created: `create` gets it, fills it in and returns it. Podman stores
/// all of it, so fields that are nothing to us must come back as they were.
#[derive(Debug, Deserialize, Serialize)]
#[serde(transparent)]
pub struct NewNetwork(Map<String, Value>);

impl NewNetwork {
    pub fn name(&self) -> &str {
        self.0
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The `-o` options.
    pub fn options(&self) -> Result<BTreeMap<String, String>, serde_json::Error> {
        let options = self.0.get("options").cloned().unwrap_or_default();
        Ok(Option::deserialize(options)?.unwrap_or_default())
    }

    /// What was asked for and a tailnet cannot give, if anything, and what to do.
    pub fn refusal(&self) -> Option<&'static str> {
        let has = |field: &str| matches!(self.0.get(field), Some(Value::Array(values)) if !values.is_empty());
        if has("subnets") {
            Some("the tailnet gives the addresses: leave out --subnet, --gateway and --ip-range")
        } else if has("routes") {
            Some("the tailnet gives the routes: leave out --route")
        } else {
            None
        }
    }

    /// No addresses from Podman, and no DNS server of its own: names are the node's to answer.
    pub fn without_addresses(mut self) -> NewNetwork {
        self.0.remove("subnets");
        self.0.insert("dns_enabled".into(), false.into());
        self.0
            .insert("ipam_options".into(), json!({ "driver": "none" }));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Podman 5.4.2, `--network tn1:hostname=zz --network-alias al --hostname hh`.
    const SETUP: &str = r#"{"container_id":"ae48c7267541","container_name":"c1",
        "port_mappings":null,"network":{"dns_enabled":true,"driver":"tailscale","id":"f00d",
        "internal":false,"ipv6_enabled":false,"name":"tn1","network_interface":null,
        "options":{"tag":"tag:foo"},"ipam_options":null,"subnets":null,"routes":null,
        "network_dns_servers":null},"network_options":{"aliases":["al","ae48c7267541","hh"],
        "interface_name":"eth0","static_ips":null,"static_mac":null,
        "options":{"hostname":"zz"}}}"#;

    fn options(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.into(), value.into())])
    }

    #[test]
    fn setup_is_read_as_podman_writes_it() {
        let attachment: Attachment = serde_json::from_str(SETUP).unwrap();
        assert_eq!(
            attachment,
            Attachment {
                container_id: "ae48c7267541".into(),
                container_name: "c1".into(),
                network: Network {
                    id: "f00d".into(),
                    name: "tn1".into(),
                    options: options("tag", "tag:foo"),
                },
                network_options: Endpoint {
                    options: options("hostname", "zz")
                },
            }
        );
    }

    #[test]
    fn what_is_null_or_new_is_passed_over() {
        let attachment: Attachment = serde_json::from_str(
            r#"{"container_id":"c","container_name":null,"from_the_future":{"a":[1]},
                "network":{"id":"i","name":"n","options":null,"driver":null},
                "network_options":{"static_ips":["100.64.0.9"],"static_mac":"aa:bb:cc:dd:ee:ff",
                                   "options":null}}"#,
        )
        .unwrap();
        assert!(attachment.network.options.is_empty());
        assert_eq!(attachment.network_options, Endpoint::default());
        let bare = r#"{"container_id":"c","network":{"id":"i","name":"n"},"network_options":null}"#;
        assert!(serde_json::from_str::<Attachment>(bare).is_ok());
    }

    #[test]
    fn what_setup_says_is_what_netavark_expects() {
        let block = StatusBlock::new(
            "tailscale0".into(),
            vec![
                "100.64.0.1/32".parse().unwrap(),
                "fd7a:115c:a1e0::1/128".parse().unwrap(),
            ],
            vec!["100.100.100.100".parse().unwrap()],
            vec!["demo.internal".into()],
        );
        assert_eq!(
            serde_json::to_string(&block).unwrap(),
            r#"{"interfaces":{"tailscale0":{"mac_address":"","subnets":[{"ipnet":"100.64.0.1/32"},{"ipnet":"fd7a:115c:a1e0::1/128"}]}},"dns_server_ips":["100.100.100.100"],"dns_search_domains":["demo.internal"]}"#
        );
    }

    #[test]
    fn a_new_network_comes_back_without_addresses_and_otherwise_as_it_was() {
        let network: NewNetwork = serde_json::from_str(
            r#"{"name":"tailnet","id":"f00d","driver":"tailscale",
                "created":"2026-01-02T03:04:05.678901234Z","ipv6_enabled":false,"internal":false,
                "dns_enabled":true,"subnets":[],"options":{"tags":"tag:web"},
                "labels":{"a":"b"},"ipam_options":{"driver":"host-local"}}"#,
        )
        .unwrap();
        assert_eq!(network.name(), "tailnet");
        assert_eq!(network.options().unwrap(), options("tags", "tag:web"));
        assert_eq!(network.refusal(), None);
        assert_eq!(
            serde_json::to_value(network.without_addresses()).unwrap(),
            json!({
                "name": "tailnet", "id": "f00d", "driver": "tailscale",
                "created": "2026-01-02T03:04:05.678901234Z", "ipv6_enabled": false,
                "internal": false, "dns_enabled": false, "options": { "tags": "tag:web" },
                "labels": { "a": "b" }, "ipam_options": { "driver": "none" },
            })
        );
    }

    #[test]
    fn what_a_tailnet_cannot_give_is_refused_with_the_flag_to_leave_out() {
        for (field, flag) in [
            (r#""subnets":[{"subnet":"10.0.0.0/24"}]"#, "--subnet"),
            (r#""routes":[{"destination":"10.0.0.0/24"}]"#, "--route"),
        ] {
            let network: NewNetwork = serde_json::from_str(&format!("{{{field}}}")).unwrap();
            assert!(network.refusal().unwrap().contains(flag), "{field}");
        }
    }
}
