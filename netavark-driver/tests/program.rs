//! The program as Podman sees it, as far as it goes without root.

#![allow(
    clippy::unwrap_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

fn run(arguments: &[&str], input: &str) -> Output {
    let mut plugin = Command::new(env!("CARGO_BIN_EXE_tailscale"))
        .args(arguments)
        .env("TAILNODE_SOCKET", "/nowhere/tailnoded.sock")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = plugin.stdin.take().unwrap();
    // `info` may be gone before it is written to.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    plugin.wait_with_output().unwrap()
}

fn answer(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn attachment() -> String {
    json!({
        "container_id": "ae48c7267541", "container_name": "web",
        "network": { "id": "f00d", "name": "tailnet" },
    })
    .to_string()
}

#[test]
fn info_names_the_interface_s_version() {
    let output = run(&["info"], "");
    assert!(output.status.success());
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        answer(&output),
        json!({ "version": version, "api_version": "1.0.0" })
    );
}

#[test]
fn a_network_is_created_without_the_daemon() {
    let output = run(
        &["create"],
        r#"{"name":"tailnet","options":{"ephemeral":"true"}}"#,
    );
    assert!(output.status.success());
    assert_eq!(answer(&output)["ipam_options"], json!({ "driver": "none" }));
    let output = run(&["create"], r#"{"name":"tailnet","options":null}"#);
    assert!(output.status.success());
}

#[test]
fn a_network_with_a_wrong_option_is_refused() {
    for (option, value, words) in [
        ("ephemerl", "true", ["`ephemerl`", "`ephemeral`"]),
        (
            "advertise-routes",
            "10.0.0.1/24",
            ["`advertise-routes`", "10.0.0.0/24?"],
        ),
    ] {
        let network = json!({ "name": "tailnet", "options": { option: value } });
        let output = run(&["create"], &network.to_string());
        assert!(!output.status.success());
        let answer = answer(&output);
        let message = answer["error"].as_str().unwrap();
        for word in ["tailscale: ", "network tailnet"].iter().chain(&words) {
            assert!(message.contains(word), "{message}");
        }
    }
}

#[test]
fn a_request_that_cannot_be_read_is_not_repeated() {
    for (arguments, request) in [
        (
            &["create"][..],
            r#"{"name":"tailnet","options":{"auth-key":"tskey-auth-QQQQ"}}"#,
        ),
        (
            &["create"],
            r#"{"name":"tailnet","options":{"tskey-auth-QQQQ":["QQQQ"]}}"#,
        ),
        (&["create"], r#"{"name":"tailnet","options":"QQQQ"}"#),
        (&["create"], r#""QQQQ""#),
        (
            &["setup", "/nowhere"],
            r#"{"container_id":"a","network":"QQQQ"}"#,
        ),
        (
            &["setup", "/nowhere"],
            r#"{"container_id":"a","network":{"options":"QQQQ"}}"#,
        ),
        (&["setup", "/nowhere"], "QQQQ"),
    ] {
        let output = run(arguments, request);
        assert!(!output.status.success());
        let words = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
        assert!(
            words[0].contains("error") && !words.concat().contains("QQQQ"),
            "{words:?}"
        );
    }
}

#[test]
fn a_start_that_fails_names_the_container_and_the_network() {
    let output = run(&["setup", "/nowhere/netns"], &attachment());
    assert!(!output.status.success());
    let answer = answer(&output);
    let message = answer["error"].as_str().unwrap();
    for word in ["container web", "network tailnet", "/nowhere/netns"] {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn a_stop_succeeds_without_the_daemon_and_without_the_namespace() {
    let output = run(&["teardown", "/nowhere/netns"], &attachment());
    assert!(output.status.success());
    assert!(output.stdout.is_empty());
    let warning = String::from_utf8(output.stderr).unwrap();
    assert!(
        warning.contains("container web") && warning.contains("tailnoded"),
        "{warning}"
    );
}

#[test]
fn what_is_no_request_is_an_error_on_standard_output() {
    for (arguments, input) in [
        (&["create"][..], "no JSON"),
        (&["setup", "/nowhere"][..], "{}"),
        (&["teardown", "/nowhere"][..], ""),
        (&[][..], ""),
        (&["--help"][..], ""),
        (&["setup"][..], ""),
    ] {
        let output = run(arguments, input);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(answer(&output)["error"].is_string(), "{arguments:?}");
    }
}
