"""Tests of the bill of materials, with the schema of CycloneDX as its reader."""

import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from crow_hf.reporting.bom import BOM, bom_of
from crow_hf.reporting.checksums import compare_checksums, sha256_of


@pytest.mark.parametrize("run", ["compared", "purified"])
def test_it_fits_the_schema(run, request):
    folder = request.getfixturevalue(run).folder
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / BOM).read_text(encoding="utf-8"))
    assert problem is None, problem


def test_its_hashes_are_those_of_the_model(purified):
    bom = json.loads((purified.folder / BOM).read_text(encoding="utf-8"))
    hashes = {part["name"]: part["hashes"][0]["content"] for part in bom["metadata"]["component"]["components"]}
    assert hashes["model.safetensors"] == sha256_of(purified.folder / "model.safetensors")
    assert "report.json" not in hashes and not compare_checksums(purified.folder)


def test_every_number_comes_from_the_report(compared):
    record = compared.record
    bom = bom_of(record)
    assert bom["serialNumber"] == bom_of(record)["serialNumber"] != bom_of(record | {"digest": "0"})["serialNumber"]
    metrics = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    (attack,) = [
        each for each in metrics if (each["type"], each["slice"]) == ("attack success", "purified, triggered prompts")
    ]
    found = record["evaluations"]["purified"]["triggered"]["target"]
    assert float(attack["value"]) == pytest.approx(found["rate"], rel=1e-3)
    assert float(attack["confidenceInterval"]["upperBound"]) == pytest.approx(found["high"], rel=1e-3)
    pedigree = bom["metadata"]["component"]["pedigree"]
    assert "BadMagic" in pedigree["patches"][0]["resolves"][0]["description"]
    assert pedigree["ancestors"][0]["name"] == record["model"]["name"]
