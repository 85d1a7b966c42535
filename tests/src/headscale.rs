use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    NameServer, Site, Underlay, eventually,
    program::{Process, ask, peer},
};

const PORT: u16 = 8080;
const STUN_PORT: u16 = 3478;

/// Headscale, with its relay and STUN, on the underlay's router.
pub struct Headscale {
    // Goes before the directory that its log is in.
    process: Process,
    state: TempDir,
    site: Site,
}

impl Headscale {
    /// Starts one whose nodes' names end in `domain`.
    pub fn start(underlay: &Underlay, domain: &str, site: Site) -> Headscale {
        let state = TempDir::new().expect("a directory for Headscale");
        fs::write(state.path().join("derp.yaml"), yaml(&site.regions)).expect("write the DERP map");
        fs::write(
            config(state.path()),
            configuration(state.path(), domain, &site),
        )
        .expect("write Headscale's configuration");
        let headscale = Headscale {
            process: spawn(underlay, &state),
            state,
            site,
        };
        headscale.wait_until_it_answers(underlay);
        headscale.ask(&["users", "create", "user"]);
        headscale
    }

    /// Ends the server. Its state stays.
    pub fn stop(&mut self) {
        self.process.terminate();
    }

    /// Starts it again after [`Headscale::stop`].
    pub fn restart(&mut self, underlay: &Underlay) {
        self.process = spawn(underlay, &self.state);
        self.wait_until_it_answers(underlay);
    }

    /// The URL that nodes log in to.
    pub fn url(&self) -> String {
        url(&self.site)
    }

    /// Makes an auth key; `flags` as for `headscale preauthkeys create`.
    pub fn key(&self, flags: &[&str]) -> String {
        let words = [&["preauthkeys", "create", "--user=1"], flags].concat();
        let output = self.ask(&words);
        output.trim().to_owned()
    }

    /// Ends all auth keys.
    pub fn revoke_keys(&self) {
        let list = self.ask(&["preauthkeys", "list", "--output=json"]);
        let keys: Vec<Value> = serde_json::from_str(&list).expect("the keys as JSON");
        for key in keys {
            let id = format!("--id={}", key["id"].to_string().trim_matches('"'));
            self.ask(&["preauthkeys", "expire", &id]);
        }
    }

    /// Lets a node in whose login page has this URL.
    pub fn approve(&self, page: &str) {
        let id = page.rsplit('/').next().unwrap_or_default();
        self.ask(&["auth", "register", "--user=user", "--auth-id", id]);
    }

    /// Says who may reach whom from now on.
    pub fn set_policy(&self, policy: &str) {
        let file = self.state.path().join("policy.hujson");
        fs::write(&file, policy).expect("write the policy");
        self.ask(&["policy", "set", "--file", &file.to_string_lossy()]);
    }

    /// Lets the node of this name route these subnets from now on, and no others.
    pub fn set_routes(&self, name: &str, routes: &[&str]) {
        let id = format!("--identifier={}", self.id(name));
        let routes = format!("--routes={}", routes.join(","));
        self.ask(&["nodes", "approve-routes", &id, &routes]);
    }

    /// Makes a node log in again, now or at a time.
    pub fn expire(&self, name: &str, at: Option<DateTime<Utc>>) {
        let id = format!("--identifier={}", self.id(name));
        let at = at.map(|at| at.to_rfc3339_opts(SecondsFormat::Secs, true));
        let at = at.map(|at| format!("--expiry={at}"));
        let words = ["nodes", "expire", &id].into_iter().chain(at.as_deref());
        self.ask(&words.collect::<Vec<_>>());
    }

    /// Forgets a node.
    pub fn delete(&self, name: &str) {
        let id = format!("--identifier={}", self.id(name));
        self.ask(&["nodes", "delete", "--force", &id]);
    }

    /// Calls a node otherwise.
    pub fn rename(&self, name: &str, new: &str) {
        let id = format!("--identifier={}", self.id(name));
        self.ask(&["nodes", "rename", new, &id]);
    }

    /// The number of the node of this name.
    fn id(&self, name: &str) -> u64 {
        let text = self.ask(&["nodes", "list", "--output=json"]);
        let nodes: Value = serde_json::from_str(&text).expect("the nodes as JSON");
        let mut nodes = nodes.as_array().into_iter().flatten();
        let node = nodes.find(|node| node["given_name"] == name);
        let id = node.and_then(|node| node["id"].as_u64());
        id.unwrap_or_else(|| panic!("Headscale has no node {name}: {text}"))
    }

    fn wait_until_it_answers(&self, underlay: &Underlay) {
        let address = (Underlay::ROUTER, PORT);
        eventually("Headscale answers", Duration::from_secs(20), || {
            underlay.router.run(|| TcpStream::connect(address)).is_ok()
        });
    }

    fn ask(&self, words: &[&str]) -> String {
        let mut command = Command::new(peer("headscale"));
        command
            .args(words)
            .arg("--config")
            .arg(config(self.state.path()));
        ask(command).unwrap_or_else(|error| panic!("headscale {words:?}: {error}"))
    }
}

fn spawn(underlay: &Underlay, state: &TempDir) -> Process {
    let mut command = underlay.router.command(peer("headscale"));
    command
        .arg("serve")
        .arg("--config")
        .arg(config(state.path()));
    Process::spawn(command, state.path().join("test.log"))
}

fn url(site: &Site) -> String {
    format!("{}://{}:{PORT}", site.scheme(), Underlay::ROUTER)
}

fn config(directory: &Path) -> PathBuf {
    directory.join("config.json")
}

fn configuration(directory: &Path, domain: &str, site: &Site) -> String {
    let router = Underlay::ROUTER;
    let (cert, key) = site.https.clone().unwrap_or_default();
    json!({
        "server_url": url(site), "tls_cert_path": cert, "tls_key_path": key,
        "listen_addr": format!("{router}:{PORT}"),
        "metrics_listen_addr": "",
        "grpc_listen_addr": "127.0.0.1:50443",
        "unix_socket": directory.join("headscale.sock"),
        "unix_socket_permission": "0700",
        "noise": { "private_key_path": directory.join("noise.key") },
        "prefixes": {
            "v4": "100.64.0.0/10", "v6": "fd7a:115c:a1e0::/48", "allocation": "sequential",
        },
        "database": { "type": "sqlite", "sqlite": { "path": directory.join("db.sqlite") } },
        "policy": { "mode": "database" },
        "dns": {
            "magic_dns": true, "base_domain": domain, "override_local_dns": false,
            "nameservers": {
                "global": [], "split": { NameServer::OFFICE_ZONE: [NameServer::OFFICE] },
            },
            "extra_records": [
                { "name": format!("wiki.{domain}"), "type": "A", "value": NameServer::WIKI },
            ],
        },
        "derp": {
            "urls": [], "paths": [directory.join("derp.yaml")], "auto_update_enabled": false,
            "server": {
                "enabled": true, "region_id": 999, "region_code": "headscale",
                "region_name": "Headscale", "verify_clients": true,
                "stun_listen_addr": format!("{router}:{STUN_PORT}"),
                "private_key_path": directory.join("derp.key"),
                "automatically_add_embedded_derp_region": true, "ipv4": router.to_string(),
            },
        },
        "disable_check_updates": true,
        "logtail": { "enabled": false },
        "log": { "level": "info" },
    })
    .to_string()
}

/// A DERP map as Headscale reads it. What is JSON is YAML, too, but for numbers as keys.
fn yaml(regions: &[Value]) -> String {
    let mut text = "regions:\n".to_owned();
    for region in regions {
        let id = &region["RegionID"];
        text += &format!("  {id}: {}\n", lower(region.clone()));
    }
    text
}

/// The same with all keys in lower case.
fn lower(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let map = map.into_iter();
            Value::Object(
                map.map(|(key, value)| (key.to_lowercase(), lower(value)))
                    .collect(),
            )
        }
        Value::Array(list) => Value::Array(list.into_iter().map(lower).collect()),
        other => other,
    }
}
