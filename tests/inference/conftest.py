from tests.models.conftest import reference as reference
