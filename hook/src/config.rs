//! A container's OCI configuration: what is read of it, and what is added to it.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{
    Capability, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType, Mount, MountBuilder,
};
use serde::Serialize;
use serde_json::{Map, Value};

const TUN: &str = "/dev/net/tun";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const OUR_RESOLV_CONF: &str = "resolv.conf.tailnode";
/// Podman binds this file of its own into every container, from the directory that it keeps for it.
const CONTAINER_ENV: &str = "/run/.containerenv";

/// The configuration. It stays JSON, and only the parts that are looked at are read: what a later
/// version of the specification adds must not be lost, and is no reason to fail.
#[derive(Clone, Debug, PartialEq)]
pub struct Config(Map<String, Value>);

impl Config {
    /// Reads the JSON.
    pub fn read(text: &str) -> Result<Config, String> {
        let config = serde_json::from_str(text).map(Config);
        config.map_err(|error| format!("cannot understand the container's configuration: {error}"))
    }

    pub fn annotations(&self) -> Result<BTreeMap<String, String>, String> {
        let annotations = self.0.get("annotations").cloned().unwrap_or_default();
        let annotations: Option<_> = serde_json::from_value(annotations)
            .map_err(|error| format!("cannot understand the container's annotations: {error}"))?;
        Ok(annotations.unwrap_or_default())
    }

    /// Where its file system is, if it says so.
    pub fn root(&self) -> Option<&Path> {
        self.at(&["root", "path"])?.as_str().map(Path::new)
    }

    /// Whether the engine gives it its networks only when this hook is through.
    pub fn network_comes_later(&self) -> bool {
        let network = self.namespace("network");
        self.namespace("user").is_some()
            && network.is_some_and(|network| network.get("path").is_none())
    }

    /// The path of its network namespace, where the engine has made that already.
    pub fn netns(&self) -> Option<&Path> {
        let path = self.namespace("network")?.get("path")?;
        path.as_str().map(Path::new)
    }

    /// Our file, if it is what the container has for its /etc/resolv.conf.
    pub fn resolv_conf(&self) -> Option<PathBuf> {
        let file = self.source_of(RESOLV_CONF)?;
        (file.file_name()? == OUR_RESOLV_CONF).then_some(file)
    }

    /// Binds a file of ours, to be made, to the container's /etc/resolv.conf, and returns it. Podman
    /// writes its own only when this hook is through. What a person mounted there stays.
    pub fn give_resolv_conf(&mut self) -> Option<PathBuf> {
        let directory = self.directory()?;
        let file = directory.join(OUR_RESOLV_CONF);
        match self.source_of(RESOLV_CONF) {
            Some(other) if other.parent() != Some(&directory) => return None,
            _ => {}
        }
        let mount = bind(RESOLV_CONF, &file, &["bind", "rprivate"]).ok()?;
        let mounts = self.0.get_mut("mounts")?.as_array_mut()?;
        mounts.retain(|mount| mount["destination"] != RESOLV_CONF);
        mounts.push(mount);
        Some(file)
    }

    /// Adds the TUN device, the permission to use it, NET_ADMIN and NET_RAW. Returns whether
    /// anything was missing. Where the runtime cannot make device nodes, it is the host's.
    pub fn give_tun(&mut self, makes_devices: bool) -> Result<bool, String> {
        let before = self.0.clone();
        let tun = LinuxDeviceBuilder::default()
            .path(TUN)
            .typ(LinuxDeviceType::C)
            .major(10)
            .minor(200)
            .file_mode(0o666_u32)
            .uid(0_u32)
            .gid(0_u32)
            .build()
            .map_err(|error| error.to_string())?;
        if makes_devices && self.namespace("user").is_none() {
            let devices = array(object(&mut self.0, "linux")?, "devices")?;
            if !devices.iter().any(|device| device["path"] == TUN) {
                devices.push(value(&tun)?);
            }
        } else if self.source_of(TUN).is_none() {
            let options = ["bind", "rprivate", "nosuid", "noexec"];
            array(&mut self.0, "mounts")?.push(bind(TUN, Path::new(TUN), &options)?);
        }
        let rule = value(&LinuxDeviceCgroup::from(&tun))?;
        let rules = array(
            object(object(&mut self.0, "linux")?, "resources")?,
            "devices",
        )?;
        // Of two rules the later one counts.
        if rules.last() != Some(&rule) {
            rules.push(rule);
        }
        let process = object(&mut self.0, "process")?;
        let is_root = process
            .get("user")
            .is_none_or(|user| user["uid"].as_u64().unwrap_or(0) == 0);
        // Who is not root keeps only ambient ones when its program starts.
        let sets: &[&str] = match is_root {
            true => &["bounding", "effective", "permitted"],
            false => &[
                "bounding",
                "effective",
                "permitted",
                "inheritable",
                "ambient",
            ],
        };
        let capabilities = object(process, "capabilities")?;
        for set in sets {
            let set = array(capabilities, set)?;
            for capability in [Capability::NetAdmin, Capability::NetRaw] {
                let capability = value(&capability)?;
                if !set.contains(&capability) {
                    set.push(capability);
                }
            }
        }
        Ok(self.0 != before)
    }

    /// The directory that Podman keeps for this container.
    fn directory(&self) -> Option<PathBuf> {
        Some(self.source_of(CONTAINER_ENV)?.parent()?.to_owned())
    }

    fn source_of(&self, destination: &str) -> Option<PathBuf> {
        let mounts = self.0.get("mounts")?.as_array()?;
        let mut there = mounts
            .iter()
            .filter(|mount| mount["destination"] == destination);
        let mount: Mount = serde_json::from_value(there.next_back()?.clone()).ok()?;
        mount.source().clone()
    }

    /// A namespace of this kind that it does not share with the engine.
    fn namespace(&self, kind: &str) -> Option<&Value> {
        let mut all = self.at(&["linux", "namespaces"])?.as_array()?.iter();
        all.find(|namespace| namespace["type"] == kind)
    }

    fn at(&self, path: &[&str]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter()
            .try_fold(self.0.get(*first)?, |value, key| value.get(key))
    }
}

/// As JSON.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Value::from(self.0.clone()))
    }
}

/// The object of this name, made if there is none.
fn object<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, String> {
    let child = parent.entry(key).or_insert(Value::Null);
    if child.is_null() {
        *child = Value::Object(Map::new());
    }
    let child = child.as_object_mut();
    child.ok_or_else(|| format!("`{key}` in the container's configuration is no object"))
}

/// The array of this name, made if there is none.
fn array<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, String> {
    let child = parent.entry(key).or_insert(Value::Null);
    if child.is_null() {
        *child = Value::Array(Vec::new());
    }
    let child = child.as_array_mut();
    child.ok_or_else(|| format!("`{key}` in the container's configuration is no array"))
}

/// A file of the host's in the place of one of the container's.
fn bind(destination: &str, source: &Path, options: &[&str]) -> Result<Value, String> {
    let mount = MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options(
            options
                .iter()
                .map(|it| (*it).to_owned())
                .collect::<Vec<_>>(),
        )
        .build();
    value(&mount.map_err(|error| error.to_string())?)
}

fn value(part: &impl Serialize) -> Result<Value, String> {
    serde_json::to_value(part).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The parts that matter of what Podman 5.4.2 shows for `--network none`.
    fn none() -> Value {
        json!({
            "ociVersion": "1.2.0", "newField": {"keep": 18446744073709551615_u64},
            "process": {"user": {"uid": 0, "gid": 0, "umask": 18}, "capabilities": {
                "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}},
            "root": {"path": "/s/overlay/layer/merged"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
                {"destination": "/run/.containerenv", "type": "bind", "source": "/c/1/userdata/.containerenv",
                    "options": ["bind", "rprivate"]}],
            "annotations": {"tailscale.hostname": "web"},
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "mount"}]},
        })
    }

    fn config(value: &Value) -> Config {
        Config::read(&value.to_string()).unwrap()
    }

    #[test]
    fn a_tunnel_gets_device_permission_and_capabilities_and_the_rest_stays() {
        let before = none();
        let mut edited = config(&before);
        assert!(edited.give_tun(true).unwrap());
        let mut wanted = before.clone();
        let all = json!(["CAP_CHOWN", "CAP_NET_ADMIN", "CAP_NET_RAW"]);
        wanted["process"]["capabilities"] =
            json!({"bounding": all, "effective": all, "permitted": all});
        wanted["linux"]["devices"] = json!([{"path": "/dev/net/tun", "type": "c", "major": 10,
            "minor": 200, "fileMode": 0o666, "uid": 0, "gid": 0}]);
        wanted["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"}]);
        assert_eq!(edited, config(&wanted));
        assert!(!edited.give_tun(true).unwrap());
        assert_eq!(edited, config(&wanted));
    }

    #[test]
    fn where_devices_cannot_be_made_the_hosts_is_there() {
        let before = none();
        let mut of_a_user = config(&before);
        assert!(of_a_user.give_tun(false).unwrap());
        assert_eq!(of_a_user.0["linux"].get("devices"), None);
        let host = json!({"destination": "/dev/net/tun", "type": "bind", "source": "/dev/net/tun",
            "options": ["bind", "rprivate", "nosuid", "noexec"]});
        assert_eq!(of_a_user.0["mounts"][2], host);
        assert!(!of_a_user.give_tun(false).unwrap());
        let mut value = before;
        value["linux"]["namespaces"] = json!([{"type": "user"}]);
        let mut mapped = config(&value);
        assert!(mapped.give_tun(true).unwrap());
        assert_eq!(mapped.0["mounts"][2], host);
    }

    #[test]
    fn who_is_not_root_keeps_the_capabilities_when_its_program_starts() {
        let mut value = none();
        value["process"]["user"]["uid"] = 1000.into();
        value["process"]["capabilities"] = Value::Null;
        value["linux"]["resources"] = Value::Null;
        let mut edited = config(&value);
        assert!(edited.give_tun(true).unwrap());
        let both = json!(["CAP_NET_ADMIN", "CAP_NET_RAW"]);
        for set in [
            "bounding",
            "effective",
            "permitted",
            "inheritable",
            "ambient",
        ] {
            assert_eq!(edited.0["process"]["capabilities"][set], both, "{set}");
        }
        for bad in [
            json!({"linux": 1}),
            json!({"process": {"capabilities": []}}),
        ] {
            let refused = config(&bad).give_tun(true).unwrap_err();
            assert!(refused.contains("is no object"), "{refused}");
        }
    }

    #[test]
    fn podmans_resolv_conf_makes_way_and_a_persons_does_not() {
        let none = none();
        let mut edited = config(&none);
        assert_eq!(edited.resolv_conf(), None);
        let file = Some(PathBuf::from("/c/1/userdata/resolv.conf.tailnode"));
        assert_eq!(edited.give_resolv_conf(), file);
        assert_eq!(edited.resolv_conf(), file);
        let with = |source: &str| {
            let mut value = none.clone();
            let mount =
                json!({"destination": "/etc/resolv.conf", "source": source, "options": ["bind"]});
            value["mounts"].as_array_mut().unwrap().push(mount);
            config(&value)
        };
        let mut on_a_bridge = with("/c/1/userdata/resolv.conf");
        assert_eq!(on_a_bridge.resolv_conf(), None);
        assert_eq!(on_a_bridge.give_resolv_conf(), file);
        assert_eq!(on_a_bridge, edited);
        for theirs in ["/etc/resolv.conf", "/c/2/userdata/resolv.conf"] {
            let mut of_theirs = with(theirs);
            assert_eq!(of_theirs.give_resolv_conf(), None);
            assert_eq!(of_theirs, with(theirs));
        }
        // An engine that keeps no such directory.
        assert_eq!(config(&json!({"mounts": []})).give_resolv_conf(), None);
    }

    #[test]
    fn networks_come_later_with_a_user_namespace() {
        let mut value = none();
        assert!(!config(&value).network_comes_later());
        value["linux"]["namespaces"] = json!([{"type": "network"}, {"type": "user"}]);
        assert!(config(&value).network_comes_later());
        value["linux"]["namespaces"] =
            json!([{"type": "network", "path": "/run/netns/n"}, {"type": "user"}]);
        assert!(!config(&value).network_comes_later());
        assert_eq!(config(&value).netns(), Some(Path::new("/run/netns/n")));
        assert_eq!(config(&json!({})).netns(), None);
        assert!(!config(&json!({})).network_comes_later());
        assert!(Config::read("[]").is_err());
    }
}
