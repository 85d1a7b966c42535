use std::{fs, net::TcpStream, path::Path, process::Command, time::Duration};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    NameServer, Underlay, eventually,
    program::{Process, ask, peer},
};

const PORT: u16 = 8080;
const STUN_PORT: u16 = 3478;

/// Headscale, with its relay and STUN, on the underlay's router.
pub struct Headscale {
    // Goes before the directory that its log is in.
    _process: Process,
    state: TempDir,
}

impl Headscale {
    /// Starts one whose nodes' names end in `domain`.
    pub fn start(underlay: &Underlay, domain: &str) -> Headscale {
        let state = TempDir::new().expect("a directory for Headscale");
        fs::write(config(state.path()), configuration(state.path(), domain))
            .expect("write Headscale's configuration");
        let mut command = underlay.router.command(peer("headscale"));
        command
            .arg("serve")
            .arg("--config")
            .arg(config(state.path()));
        let process = Process::spawn(command, state.path().join("test.log"));
        let headscale = Headscale {
            _process: process,
            state,
        };
        let address = (Underlay::ROUTER, PORT);
        eventually("Headscale answers", Duration::from_secs(20), || {
            underlay.router.run(|| TcpStream::connect(address)).is_ok()
        });
        headscale.ask(&["users", "create", "user"]);
        headscale
    }

    /// The URL that nodes log in to.
    pub fn url(&self) -> String {
        url()
    }

    /// Makes an auth key; `flags` as for `headscale preauthkeys create`.
    pub fn key(&self, flags: &[&str]) -> String {
        let words = [&["preauthkeys", "create", "--user=1"], flags].concat();
        let output = self.ask(&words);
        output.trim().to_owned()
    }

    /// Lets a node in whose login page has this URL.
    pub fn approve(&self, page: &str) {
        let id = page.rsplit('/').next().unwrap_or_default();
        self.ask(&["auth", "register", "--user=user", "--auth-id", id]);
    }

    /// Calls the node of this name otherwise.
    pub fn rename(&self, name: &str, to: &str) {
        let list = self.ask(&["nodes", "list", "--output=json"]);
        let nodes: Vec<Value> = serde_json::from_str(&list).expect("a list of nodes");
        let node = nodes.iter().find(|node| node["given_name"] == name);
        let id = &node.expect("a node of this name")["id"];
        self.ask(&["nodes", "rename", to, &format!("--identifier={id}")]);
    }

    /// Says who may reach whom from now on.
    pub fn set_policy(&self, policy: &str) {
        let file = self.state.path().join("policy.hujson");
        fs::write(&file, policy).expect("write the policy");
        self.ask(&["policy", "set", "--file", &file.to_string_lossy()]);
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

fn url() -> String {
    format!("http://{}:{PORT}", Underlay::ROUTER)
}

fn config(directory: &Path) -> std::path::PathBuf {
    directory.join("config.json")
}

fn configuration(directory: &Path, domain: &str) -> String {
    let router = Underlay::ROUTER;
    json!({
        "server_url": url(),
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
            "urls": [], "paths": [], "auto_update_enabled": false,
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
