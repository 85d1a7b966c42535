use tailnode_tun::{Exit, Interface};

use super::*;

const POD: &[(&str, &str)] = &[
    ("CNI_CONTAINERID", "ae48c7267541"),
    ("CNI_NETNS", "/run/netns/web"),
    ("CNI_IFNAME", "eth0"),
    (
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=7",
    ),
];

fn read_in(command: &str, environment: &[(&str, &str)], config: &str) -> Result<Command, Failure> {
    let variable = |name: &str| {
        let found = environment.iter().find(|(it, _)| *it == name)?;
        Some(found.1.to_owned())
    };
    Command::read(command, variable, config)
}

/// A command about a pod, with these fields beside version and name.
fn read(command: &str, fields: Value) -> Result<Command, Failure> {
    let mut config = json!({ "cniVersion": "1.1.0", "name": "tailnet", "type": "tailscale" });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    read_in(command, POD, &config.to_string())
}

fn network(fields: Value) -> (Network, Attachment) {
    match read("ADD", fields).unwrap() {
        Command::Add(network, attachment) => (network, attachment),
        other => panic!("{other:?}"),
    }
}

fn attached(device: &str) -> Attached {
    Attached {
        device: device.into(),
        interface: Interface {
            addresses: vec![
                "100.64.0.7/32".parse().unwrap(),
                "fd7a:115c:a1e0::7/128".parse().unwrap(),
            ],
            routes: vec!["100.64.0.0/10".parse().unwrap()],
            mtu: 1280,
            index: 0,
            trap_dns: false,
            exit: Exit::No,
            forwards: false,
        },
        dns_servers: vec!["100.100.100.100".parse().unwrap()],
        search_domains: vec!["demo.internal".into()],
    }
}

#[test]
fn a_pod_is_asked_for_with_its_network_s_options_and_its_own() {
    let (network, pod) = network(json!({
        "options": { "tags": ["tag:web", "tag:prod"], "ephemeral": true, "hostname": "web" },
        "capabilities": { ANNOTATIONS: true }, "args": { "cni": {} }, "dns": {},
        "runtimeConfig": { ANNOTATIONS: { "tailscale.hostname": "front" }, "mac": "" },
        "ipam": {},
    }));
    assert_eq!((&*pod.netns, &*pod.ifname), ("/run/netns/web", "eth0"));
    let Place {
        engine,
        container_id,
        container_name,
        network_id,
        network_name,
        network_options,
        annotations,
        device,
        ..
    } = network.place_of(&pod);
    assert_eq!(device.as_deref(), Some("eth0"));
    assert_eq!(engine, Engine::Cni);
    assert_eq!(
        [container_id, container_name, network_id, network_name],
        ["ae48c7267541", "web-0.shop", "tailnet/eth0", "tailnet"]
    );
    let options = [
        ("ephemeral", "true"),
        ("hostname", "web"),
        ("tags", "tag:web+tag:prod"),
    ];
    let text = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    assert_eq!(network_options, options.map(text).into());
    assert_eq!(annotations, [text(("tailscale.hostname", "front"))].into());
}

#[test]
fn a_container_without_a_pod_goes_by_its_id() {
    for (id, name) in [
        ("default-web", "default-web"),
        (&*"0a1b".repeat(16), "0a1b0a1b0a1b"),
    ] {
        let attachment = Attachment {
            container_id: id.into(),
            ..Attachment::default()
        };
        assert_eq!(attachment.name(), name);
    }
}

#[test]
fn alone_the_result_is_the_tailnet_s() {
    let (network, pod) = network(json!({}));
    assert!(!network.is_chained());
    assert_eq!(
        network.result(&pod.netns, &attached("eth0")).unwrap(),
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/web", "mtu": 1280 }],
            "ips": [{ "address": "100.64.0.7/32", "interface": 0 },
                    { "address": "fd7a:115c:a1e0::7/128", "interface": 0 }],
            "routes": [{ "dst": "100.64.0.0/10" }],
            "dns": { "nameservers": ["100.100.100.100"], "search": ["demo.internal"] },
        })
    );
    let result = network.result(&pod.netns, &attached("eth0")).unwrap();
    let Command::Check(network, _) = read("CHECK", json!({ "prevResult": result })).unwrap() else {
        panic!("no CHECK");
    };
    let addresses = attached("eth0").interface.addresses;
    assert_eq!(network.addresses("eth0").unwrap(), addresses);
}

fn bridged() -> Value {
    json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "cni0", "mac": "00:11:22:33:44:55" },
                       { "name": "eth0", "mac": "99:88:77:66:55:44", "sandbox": "/run/netns/web" }],
        "ips": [{ "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1 }],
        "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.0.1", "priority": 7 }],
        "dns": { "nameservers": ["10.1.0.1"], "domain": "lan", "search": ["lan", "demo.internal"],
                 "options": ["ndots:5"] },
        "of-the-future": [1],
    })
}

#[test]
fn behind_a_bridge_the_result_is_the_bridge_s_with_the_tailnet_s_interface_behind_it() {
    let (network, pod) = network(json!({ "prevResult": bridged() }));
    assert!(network.is_chained());
    let result = network.result(&pod.netns, &attached("tailscale0")).unwrap();
    let mut expected = bridged();
    let own = json!({ "name": "tailscale0", "sandbox": "/run/netns/web", "mtu": 1280 });
    expected["interfaces"].as_array_mut().unwrap().push(own);
    expected["dns"]["nameservers"] = json!(["100.100.100.100", "10.1.0.1"]);
    assert_eq!(result, expected);

    // What CHECK is told again.
    let Command::Check(network, _) = read("CHECK", json!({ "prevResult": result })).unwrap() else {
        panic!("no CHECK");
    };
    assert_eq!(network.addresses("tailscale0").unwrap(), []);
    // Of the host's, not of the container's.
    for device in ["cni0", "tailscale1"] {
        let failure = network.addresses(device).unwrap_err();
        assert_eq!(failure.code, Code::Missing as u32);
    }
}

#[test]
fn empty_parts_of_an_earlier_result_may_be_null_or_absent() {
    for earlier in [
        json!({}),
        json!({ "interfaces": null, "ips": null, "dns": null }),
    ] {
        let (network, pod) = network(json!({ "prevResult": earlier }));
        let mut silent = attached("tailscale0");
        silent.dns_servers.clear();
        silent.search_domains.clear();
        let result = network.result(&pod.netns, &silent).unwrap();
        assert_eq!(result["interfaces"][0]["name"], "tailscale0");
        assert_eq!(result["dns"], json!({}));
    }
    let (network, pod) = network(json!({ "prevResult": { "ips": "none" } }));
    let failure = network.result(&pod.netns, &attached("eth0")).unwrap_err();
    assert_eq!(failure.code, Code::Decode as u32);
}

#[test]
fn each_version_gets_results_and_errors_of_its_own() {
    for version in VERSIONS {
        let (network, pod) = network(json!({ "cniVersion": version }));
        let result = network.result(&pod.netns, &attached("eth0")).unwrap();
        assert_eq!(result["cniVersion"], version);
        let old = version == "0.4.0";
        let families = ["4", "6"].map(|it| if old { json!(it) } else { Value::Null });
        assert_eq!(
            [0, 1].map(|it| result["ips"][it]["version"].clone()),
            families
        );
        let failure = read("ADD", json!({ "cniVersion": version, "name": "" })).unwrap_err();
        assert_eq!(failure.version, version);
        for late in ["GC", "STATUS"] {
            let read = read(
                late,
                json!({ "cniVersion": version, "cni.dev/valid-attachments": [] }),
            );
            let code = read.err().map(|failure| failure.code);
            assert_eq!(code, (version != NEWEST).then_some(1), "{late} {version}");
        }
    }
    assert_eq!(
        read_in("VERSION", &[], "").unwrap(),
        Command::Version(NEWEST.into())
    );
    assert_eq!(
        read_in("VERSION", &[], r#"{"cniVersion":"0.4.0"}"#).unwrap(),
        Command::Version("0.4.0".into())
    );
    assert_eq!(
        versions("0.4.0"),
        json!({ "cniVersion": "0.4.0", "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"] })
    );
}

#[test]
fn what_is_owned_is_told_by_container_and_interface() {
    let owned = json!([{ "containerID": "ae48c7267541", "ifname": "eth0" }]);
    let command = read("GC", json!({ "cni.dev/valid-attachments": owned })).unwrap();
    let Command::Gc(network, owned) = command else {
        panic!("no GC");
    };
    assert_eq!(owned, [network.place("ae48c7267541".into(), "eth0")]);
    for none in [json!({ "cni.dev/valid-attachments": null }), json!({})] {
        let none = read("GC", none).unwrap();
        assert!(matches!(none, Command::Gc(_, owned) if owned.is_empty()));
    }
}

#[test]
fn del_needs_no_namespace_and_no_result_and_no_good_options() {
    let bare = &POD[..1]
        .iter()
        .chain(&POD[2..3])
        .copied()
        .collect::<Vec<_>>()[..];
    let config = r#"{"cniVersion":"1.1.0","name":"tailnet","options":{"ephemerl":"true"}}"#;
    let Command::Del(_, attachment) = read_in("DEL", bare, config).unwrap() else {
        panic!("no DEL");
    };
    assert_eq!(attachment.netns, "");
    for command in ["ADD", "CHECK"] {
        let failure = read_in(command, bare, config).unwrap_err();
        assert!(failure.msg.contains("CNI_NETNS"), "{failure:?}");
    }
}

#[test]
fn each_mistake_has_the_specification_s_code() {
    let coded = |command: &str, fields: Value, code: u32, word: &str| {
        let failure = read(command, fields).unwrap_err();
        assert_eq!(failure.code, code, "{failure:?}");
        assert!(failure.msg.contains(word), "{failure:?}");
        failure
    };
    coded("ADD", json!({ "cniVersion": "0.2.0" }), 1, "0.2.0");
    coded("ADD", json!({ "cniVersion": null }), 1, "0.1.0");
    coded("ADD", json!({ "cniVersion": 1 }), 6, "cniVersion");
    coded(
        "ADD",
        json!({ "ipam": { "type": "dhcp" } }),
        2,
        r#"ipam: {"type":"dhcp"}"#,
    );
    let unknown = coded(
        "ADD",
        json!({ "options": { "ephemerl": true } }),
        2,
        "ephemerl: true",
    );
    assert!(unknown.details.contains("`ephemeral`"), "{unknown:?}");
    let secret = coded(
        "ADD",
        json!({ "options": { "key": "tskey-auth-x" } }),
        2,
        "key",
    );
    assert!(
        !format!("{secret:?}").contains("tskey-auth-x"),
        "{secret:?}"
    );
    coded("ADD", json!({ "options": { "tags": 7 } }), 7, "tags");
    coded(
        "ADD",
        json!({ "options": { "ephemeral": "maybe" } }),
        7,
        "ephemeral",
    );
    coded(
        "STATUS",
        json!({ "options": { "ephemeral": "maybe" } }),
        7,
        "ephemeral",
    );
    coded("ADD", json!({ "options": "tags" }), 6, "form");
    coded(
        "ADD",
        json!({ "runtimeConfig": { ANNOTATIONS: [] } }),
        6,
        "form",
    );
    coded("ADD", json!({ "name": "a/b" }), 7, "name");
    coded("ADD", json!({ "name": null }), 7, "name");
    coded("CHECK", json!({}), 7, "prevResult");
    coded("PLAY", json!({}), 4, "CNI_COMMAND");
    assert_eq!(read_in("ADD", POD, "no JSON").unwrap_err().code, 6);
    assert_eq!(read_in("ADD", POD, "").unwrap_err().code, 6);
    for (name, value) in [
        ("CNI_CONTAINERID", "../x"),
        ("CNI_CONTAINERID", ""),
        ("CNI_NETNS", ""),
        ("CNI_IFNAME", "sixteen-bytes-xx"),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "eth%d"),
        ("CNI_ARGS", "K8S_POD_NAME"),
    ] {
        let with = |&(own, before): &(&'static str, &'static str)| match own == name {
            true => (own, value),
            false => (own, before),
        };
        let environment: Vec<_> = POD.iter().map(with).collect();
        let config = r#"{"cniVersion":"1.0.0","name":"tailnet"}"#;
        let failure = read_in("ADD", &environment, config).unwrap_err();
        assert_eq!((failure.code, &*failure.version), (4, "1.0.0"));
        assert!(failure.msg.contains(name), "{failure:?}");
    }
}

#[test]
fn an_error_is_written_as_the_specification_has_it() {
    let failure = Failure::new(Code::TryAgain, "not now").about("container web on network n");
    assert_eq!(
        serde_json::to_value(&failure).unwrap(),
        json!({ "cniVersion": "1.1.0", "code": 11, "msg": "container web on network n: not now" })
    );
    let failure = failure.details("later".into()).in_version("0.4.0");
    let failure = serde_json::to_value(failure.with(Code::Unavailable)).unwrap();
    assert_eq!(
        [
            &failure["cniVersion"],
            &failure["code"],
            &failure["details"]
        ],
        [&json!("0.4.0"), &json!(50), &json!("later")]
    );
}
